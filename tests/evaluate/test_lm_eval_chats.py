"""The harness's chats: text and likelihoods against its own Hugging Face model with the same template and weights."""

from pathlib import Path
from typing import Any

import pytest

from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import DEFAULT_TEMPLATE, ROLE_TEMPLATE, ChatTemplate
from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.config.settings import decode_settings
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.lm_eval_chats import LmEvalChats
from ray_ds.evaluate.lm_eval_model import as_lm_eval_model
from ray_ds.evaluate.lm_eval_tasks import run_harness
from tests.chat.test_encoding import CHATML
from tests.evaluate.harness_model import harness_model
from tests.evaluate.lm_eval_sets import CHOICE, WRITTEN, write_sets
from tests.evaluate.test_lm_eval_model import answers
from tests.evaluate.tiny_tasks import tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " the sky?\n"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "one two?"},
]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "It is "}]
TEMPLATES = [DEFAULT_TEMPLATE, ROLE_TEMPLATE, CHATML]


def encoder(template: str) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(template), tiny_tokenizer())


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return harness_model(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", [MESSAGES, BEGUN, [*MESSAGES[1:], BEGUN[-1]]])
def test_text_is_that_of_transformers(template: str, messages: list[dict[str, str]]) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_tokenizer()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_json()), bos_token="<|bos|>", eos_token="<|eos|>"
    )
    asks = messages[-1]["role"] == "user"
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=asks, continue_final_message=not asks
    )
    chats = LmEvalChats(encoder(template), tokenizer)
    text = chats.render(messages, add_generation_prompt=asks)
    assert text == expected
    tokens, begun = chats.opening(text)
    before = messages if asks else messages[:-1]
    assert list(tokens) == encoder(template).encode_prompt(before)
    assert begun == ("" if asks else "It is" if template == CHATML else "It is ")
    assert chats.opening("plain text") == ((), "plain text")


def test_a_message_that_spells_a_special_token_is_text() -> None:
    tokenizer = tiny_tokenizer()
    chats = LmEvalChats(encoder(ROLE_TEMPLATE), tokenizer)
    text = chats.render([{"role": "user", "content": "a<|eos|>b"}], add_generation_prompt=True)
    tokens, _ = chats.opening(text)
    assert text == "<|bos|><|user|>a<|eos|>b<|eos|><|assistant|>" and tokens.count(tokenizer.eos_id) == 1


def test_a_template_that_takes_no_system_message_says_so() -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"roles system, user, .* must be what the chat template takes \(no system\)"):
        LmEvalChats(encoder(refusing), tiny_tokenizer()).render(MESSAGES, add_generation_prompt=True)


def run(model: Any, folder: Path, tasks: list[str], **options: Any) -> dict[str, Any]:
    """Return each sample of the harness's tasks: what it asked and what the model said."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        **options,
    )
    return {
        name: [(list(map(tuple, own["arguments"])), own["resps"]) for own in samples]
        for name, samples in found["samples"].items()
    }


@pytest.mark.slow
@pytest.mark.shows("lm_eval's tasks as chats are what its own transformers adapter makes of the same template")
@pytest.mark.parametrize("fewshot_as_multiturn", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_tasks_are_asked_as_the_harnesss_transformers_model_is(
    hf_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, fewshot_as_multiturn: bool
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    shots = {"fewshot_split": "test", "description": "Choose."}
    folder = write_sets(
        tmp_path / "sets",
        mine={**CHOICE, **shots},
        begun={**CHOICE, **shots, "gen_prefix": "It is"},
        write={**WRITTEN, **shots},
    )
    monkeypatch.chdir(folder)
    ours = answers()
    ours.chats = LmEvalChats(encoder(template), tiny_tokenizer())
    hf_model.tokenizer.chat_template = template
    options: dict[str, Any] = {
        "num_fewshot": 2,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": "Be short.",
    }
    names = ["mine", "begun", "write"]
    found = run(as_lm_eval_model(ours), folder, names, **options)
    expected = run(hf_model, folder, names, **options)
    for name in names:
        assert [asked for asked, _ in found[name]] == [asked for asked, _ in expected[name]]
        assert "Be short." in found[name][0][0][0][0] and "Choose." in found[name][0][0][0][0]
    if template == ROLE_TEMPLATE:  # here tokens of an answer are the same alone and behind what asks for it
        for name in ("mine", "begun"):
            for (_, own), (_, theirs) in zip(found[name], expected[name], strict=True):
                for (one,), (other,) in zip(own, theirs, strict=True):
                    assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
        assert [own for _, own in found["write"]] == [own for _, own in expected["write"]]


@pytest.mark.slow
def test_the_stages_settings_reach_the_harness(tmp_path: Path) -> None:
    folder = write_sets(tmp_path / "sets", mine={**CHOICE, "fewshot_split": "test"})
    raw = {"include_path": str(folder), "tasks": ["mine"], "shots": 1, "apply_chat_template": True}
    settings = decode_settings(LmEvalSettings, {**raw, "system_instruction": "Be short."}, where="lm_eval")
    seen: list[list[dict[str, str]]] = []
    ours = answers()
    chats = ours.chats = LmEvalChats(encoder(ROLE_TEMPLATE), tiny_tokenizer())
    render = chats.render
    chats.render = lambda messages, **own: seen.append(messages) or render(messages, **own)  # type: ignore[assignment, func-returns-value]
    found = run_harness(ours, settings, "evaluate.lm_eval")
    assert found["chat"] is True
    assert [[message["role"] for message in messages] for messages in seen] == [
        ["system", "user", "assistant", "user"]
    ] * 6
    with pytest.raises(ConfigError, match=r"apply_chat_template \(True\) needs a model with a chat template; evaluate"):
        run_harness(answers(), settings, "evaluate.lm_eval")


def test_turns_without_a_chat_are_refused() -> None:
    raw = {"include_path": "/sets", "tasks": ["mine"]}
    assert decode_settings(LmEvalSettings, raw, where="x").fewshot_as_multiturn is None
    assert decode_settings(LmEvalSettings, {**raw, "apply_chat_template": True}, where="x").fewshot_as_multiturn
    with pytest.raises(
        ConfigError, match=r"x.fewshot_as_multiturn \(False\) has no effect without apply_chat_template"
    ):
        decode_settings(LmEvalSettings, {**raw, "fewshot_as_multiturn": False}, where="x")
