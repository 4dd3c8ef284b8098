"""The adapter to lm-evaluation-harness against the harness's own Hugging Face model on the same weights."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.continuations import Key
from ray_ds.evaluate.lm_eval_model import LmEvalAnswers, as_lm_eval_model, check_lm_eval
from ray_ds.evaluate.tasks import Batch, Result, run_batch
from tests.evaluate.harness_model import harness_model
from tests.evaluate.tiny_tasks import MAX_LEN, tiny_decoder, tiny_tokenizer, write_jsonl

LONG = "Question: what is the colour of the sky? Answer: blue. " * 40
CONTEXTS = ["Question: the sky? Answer:", "", "blue sky ", "blue sky \n", "the colour of"]
CONTINUATIONS = [" yes", " maybe blue", " no", "true one two"]


def answers(micro_batch: int = 4) -> LmEvalAnswers:
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(tokenizer)

    def run_batches(batches: Sequence[Batch]) -> dict[Key, Result]:
        return {key: own for batch in batches for key, own in run_batch(decoder, tokenizer, batch).items()}

    return LmEvalAnswers(run_batches, tokenizer, seq_len=MAX_LEN, micro_batch=micro_batch)


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return harness_model(tmp_path_factory.mktemp("hf"), starts_with_bos=True)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


@pytest.mark.slow
@pytest.mark.shows("lm_eval's log-likelihoods of a checkpoint are those of its own transformers adapter")
def test_loglikelihoods_are_those_of_the_harnesss_transformers_model(hf_model: Any) -> None:
    asked = requests("loglikelihood", [(a, b) for a in CONTEXTS for b in CONTINUATIONS])
    ours = as_lm_eval_model(answers())
    expected = hf_model.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [own[0] for own in found] == pytest.approx([own[0] for own in expected], abs=1e-3)
    assert [own[1] for own in found] == [own[1] for own in expected]
    assert ours.num_cut == 0


@pytest.mark.slow
def test_a_long_context_keeps_bos_and_its_end_and_is_counted(hf_model: Any) -> None:
    tokenizer, ours = tiny_tokenizer(), answers()
    (found,) = ours.loglikelihood([(LONG.strip(), " yes blue")])
    last = tokenizer.encode(" yes blue")
    kept = [tokenizer.bos_id, *tokenizer.encode(LONG.strip())[-(MAX_LEN - len(last)) :]]
    assert len(kept) + len(last) - 1 == MAX_LEN
    (expected,) = hf_model._loglikelihood_tokens([(("", ""), kept, last)], disable_tqdm=True)
    assert found == (pytest.approx(expected[0], abs=1e-3), expected[1])
    assert ours.num_cut == 1


@pytest.mark.slow
def test_rolling_loglikelihoods_are_those_of_the_harnesss_transformers_model(hf_model: Any) -> None:
    asked = requests("loglikelihood_rolling", [("blue",), (LONG,), ("the colour of the sky",)])
    # The harness's own prefix is BOS twice where its tokenizer adds one; ours is BOS once.
    hf_model.add_bos_token = False
    hf_model.tokenizer.backend_tokenizer.post_processor = None
    expected = hf_model.loglikelihood_rolling(asked, disable_tqdm=True)
    assert as_lm_eval_model(answers()).loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-4)


def test_answers_are_greedy_unless_told_and_stop_where_they_are_told() -> None:
    model = answers()
    (whole,) = model.generate_until([("Answer:", {"max_gen_toks": 12})])
    stop = whole[len(whole) // 2 :][:2]
    shorter = whole[: whole.index(stop)]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("Answer:", {"until": stop, "max_gen_toks": 12, "top_p": 0.9}),
        ("Answer:", {"until": ["nowhere", stop], "max_new_tokens": 12, "temperature": 0.0, "do_sample": False}),
    ]
    assert model.generate_until(asked) == [shorter] * 2
    sampled: list[tuple[str, dict[str, Any]]] = [("Answer:", {"do_sample": True, "temperature": 2.0, "max_tokens": 12})]
    assert model.generate_until(sampled) == model.generate_until(sampled) != [whole]
    with pytest.raises(ConfigError, match=r"generation_kwargs.top_k \(3\) must be one of do_sample, max_gen_toks"):
        model.generate_until([("Answer:", {"do_sample": True, "top_k": 3})])
    with pytest.raises(InputError, match=r"answer \(max_gen_toks 1000\) must fit into the 256 tokens"):
        model.generate_until([("Answer:", {"max_gen_toks": 1000})])


@pytest.mark.slow
@pytest.mark.shows("lm_eval runs its own task files, on local data, with a checkpoint of ours")
def test_the_harness_runs_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    items = [{"q": f"the sky {i}?", "options": ["yes", "no"], "right": i % 2} for i in range(6)]
    data = write_jsonl(tmp_path / "items.jsonl", *items)
    task: dict[str, Any] = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}} Answer:",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(json.dumps(task))  # JSON is YAML
    model = as_lm_eval_model(answers())
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    ours = answers().loglikelihood(
        [(f"Question: {own['q']} Answer:", f" {option}") for own in items for option in ("yes", "no")]
    )
    right = sum((ours[2 * i][0] < ours[2 * i + 1][0]) == own["right"] for i, own in enumerate(items))
    assert found["results"]["mine"]["acc,none"] == pytest.approx(right / 6)


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError) as caught:
        check_lm_eval("model")
    assert str(caught.value) == (
        "model (lm_eval) needs the package lm_eval, which is not installed here; pip install 'ray_ds[lm-eval]'."
    )
