"""The serving bench: every system with a tiny model, what is made of its times, and the load on an endpoint."""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from jobs.bench import serve
from jobs.bench.serving import in_graph_loop, in_our_engine, in_transformers, work
from jobs.bench.serving.first_token import measure_first_tokens
from jobs.bench.serving.gguf_file import gguf_name, in_gguf_order, read_bfloat16, write_gguf
from jobs.bench.serving.load import Question, Reply, ask, new_session, percentile
from jobs.bench.serving.models import MODELS, ModelFolders, write_model
from jobs.bench.serving.overload import goodput, measure_overload
from jobs.bench.serving.systems import all_systems, run_system
from jobs.bench.serving.work import Work, measure
from ray_ds.model.checkpoint_folder import read_tensors
from ray_ds.serve.engine import Engine
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.service import CompletionService, ModelCard
from ray_ds.serve.limits import LocalLedger
from tests.serve.conftest import FakeModel
from tests.serve.http.conftest import ServedTokenizer, serving

TINY = ("tiny_dense", "tiny_deepseek")
NO_PYTHONS = {"llama_cpp": None, "vllm": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolders]:
    return {name: write_model(MODELS[name], tmp_path_factory.mktemp(name)) for name in TINY}


def work_for(folder: Path, name: str = "tiny_dense", **changes: Any) -> Work:
    given = {"concurrency": [1, 3], "runs": 1, "threads": 1, "prompt_tokens": 8, "output_tokens": 5, **changes}
    return Work(folder=str(folder), vocab_size=MODELS[name].vocab_size, **given)


@pytest.mark.parametrize("exactness", ["none", "batch", "schedule"])
@pytest.mark.parametrize("name", TINY)
def test_our_engine_answers_every_case(folders: dict[str, ModelFolders], name: str, exactness: str) -> None:
    found = measure(work_for(folders[name].int8, name, exactness=exactness), in_our_engine.load)
    assert [row["concurrency"] for row in found["rows"]] == [1, 3]
    assert all(row["output_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 for row in found["rows"])
    assert found["rss_bytes"] > 50e6 and found["load_s"] > 0


@pytest.mark.parametrize("name", TINY)
def test_transformers_answers_with_as_many_tokens(folders: dict[str, ModelFolders], name: str) -> None:
    ours = in_our_engine.load(work_for(folders[name].int8, name))
    theirs = in_transformers.load(work_for(folders[name].floats, name))
    for count, num_tokens in ((1, 1), (3, 5)):
        prompts = work_for(folders[name].int8, name).prompts(count, "tokens")
        assert list(ours(prompts, num_tokens)) == list(theirs(prompts, num_tokens)) == [num_tokens] * count


def test_the_graph_loop_gives_the_tokens_of_generate(
    folders: dict[str, ModelFolders], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, mode: step)
    asked = work_for(folders["tiny_dense"].floats)
    model = in_transformers.load_model(asked).float()
    answer = in_graph_loop.loop_with(model, asked)
    for name in ("first", "second"):  # the second finds the first one's cache
        prompts = asked.prompts(3, name)
        expected = model.generate(torch.tensor(prompts), max_new_tokens=5, do_sample=False)[:, 8:]
        assert answer(prompts, 5) == expected.tolist()


def test_prompts_are_the_same_for_every_system_and_new_every_time() -> None:
    asked = work_for(Path("/model"))
    assert asked.prompts(3, "a") == asked.prompts(3, "a") != asked.prompts(3, "b")
    assert Work(**json.loads(asked.to_json())) == asked
    assert all(0 <= token < asked.vocab_size for prompt in asked.prompts(3, "a") for token in prompt)


def test_figures_are_medians_with_prefill_apart_from_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    wholes = iter([99.0, 10.0, 12.0, 30.0])  # the first warms up

    def generate(prompts: work.Prompts, num_tokens: int) -> list[int]:
        clock[0] += 2.0 if num_tokens == 1 else next(wholes)
        return [num_tokens] * len(prompts)

    monkeypatch.setattr(work.time, "perf_counter", lambda: clock[0])
    (row,) = measure(work_for(Path("/model"), concurrency=[4], runs=3), lambda asked: generate)["rows"]
    assert row == {
        "concurrency": 4,
        "output_tokens_per_s": 4 * 5 / 12,
        "slowest_output_tokens_per_s": 4 * 5 / 30,
        "fastest_output_tokens_per_s": 4 * 5 / 10,
        "prefill_tokens_per_s": 4 * 8 / 2,
        "decode_tokens_per_s": 4 * 4 / (12 - 2),
    }


def test_answers_of_another_length_are_not_counted() -> None:
    with pytest.raises(RuntimeError, match=r"answers have \[5, 4\] tokens; each of 2 must have 5"):
        measure(work_for(Path("/model"), concurrency=[2]), lambda asked: lambda prompts, num_tokens: [5, 4])


def test_a_system_runs_as_a_program_and_one_that_cannot_says_why(folders: dict[str, ModelFolders]) -> None:
    asked = work_for(Path(), concurrency=[2])
    ours, *_ = all_systems(NO_PYTHONS)
    found = run_system(ours, folders["tiny_dense"], asked)
    assert [row["concurrency"] for row in found["rows"]] == [2]
    (weights,) = folders["tiny_dense"].int8.glob("*.safetensors")
    assert found["weights_bytes"] == weights.stat().st_size
    broken = replace(ours, module="in_llama_cpp")
    assert "No module named 'llama_cpp'" in run_system(broken, folders["tiny_dense"], asked)["failed"]
    assert run_system(ours, folders["tiny_dense"], asked, timeout_s=0.1) == {"failed": "no figures within 0.1 s"}


def run_main(monkeypatch: pytest.MonkeyPatch, words: list[str], failing: str) -> None:
    def run(system: Any, folders: ModelFolders, asked: Work) -> dict[str, Any]:
        if system.name == failing:
            return {"failed": "exit 1\nout of memory"}
        generate = lambda prompts, num_tokens: [num_tokens] * len(prompts)  # noqa: E731
        return {**measure(asked, lambda _: generate), "weights_bytes": 1}

    monkeypatch.setattr(serve, "run_system", run)
    monkeypatch.setattr(sys, "argv", ["serve", "--parts", "engine", "--output-tokens", "4", "--runs", "1", *words])
    serve.main()


def test_the_last_line_names_every_system(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--models", *TINY, "--concurrency", "1", "8", "--llama-cpp-python", "python"]
    run_main(monkeypatch, words, failing="llama_cpp")
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found.keys() == {"name", "inputs", "figures", "peers"} and found["name"] == "serve"
    ours = {(row["model"], row["exactness"], row["concurrency"]) for row in found["figures"]["engine"]}
    assert ours == {(name, kind, count) for name in TINY for kind in ("none", "batch", "schedule") for count in (1, 8)}
    peers = found["peers"]["engine"]
    assert sum(row["system"] == "transformers" and row["output_tokens_per_s"] > 0 for row in peers) == 4
    reasons = {
        (row["model"], row["system"]): row.get("not_run") or row["failed"] for row in peers if "load_s" not in row
    }
    assert reasons.pop(("tiny_dense", "llama_cpp")) == "exit 1\nout of memory"
    assert reasons == {
        ("tiny_dense", "vllm"): "no --vllm-python was given",
        ("tiny_dense", "graph_loop"): "runs with --device cuda",
        ("tiny_deepseek", "llama_cpp"): "its file is written for dense models",
        ("tiny_deepseek", "vllm"): "no --vllm-python was given",
        ("tiny_deepseek", "graph_loop"): "runs with --device cuda",
    }
    assert any("vllm" in line and line.endswith("not run: no --vllm-python was given") for line in table)


def test_without_our_own_figures_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"our engine gave no figures:\nexit 1\nout of memory"):
        run_main(monkeypatch, ["--models", "tiny_dense"], failing="ours")


def test_query_and_key_keep_their_products_when_turned_llama_cpps_way() -> None:
    """transformers turns numbers half a head apart, llama.cpp neighbours: in its own order, each gives the same."""
    heads, width, hidden = 2, 8, 6
    config = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width}
    generator = np.random.default_rng(0)
    query, key = (generator.standard_normal((heads * width, hidden)).astype(np.float32) for _ in range(2))
    x, y = generator.standard_normal((2, hidden)).astype(np.float32)
    turns = np.exp(1j * 3 * 10000.0 ** (-np.arange(0, width, 2) / width))  # between two places 3 apart

    def product(q: np.ndarray, k: np.ndarray, *, is_interleaved: bool) -> np.ndarray:
        def pairs(vector: np.ndarray) -> np.ndarray:
            rows = vector.reshape(heads, width)
            real, imaginary = (rows[:, ::2], rows[:, 1::2]) if is_interleaved else np.split(rows, 2, axis=1)
            return real + 1j * imaginary

        return (pairs(q) * turns * pairs(k).conj()).real.sum(axis=1)

    expected = product(query @ x, key @ y, is_interleaved=False)
    query_rows = in_gguf_order("model.layers.0.self_attn.q_proj.weight", query, config)
    key_rows = in_gguf_order("model.layers.0.self_attn.k_proj.weight", key, config)
    np.testing.assert_allclose(product(query_rows @ x, key_rows @ y, is_interleaved=True), expected, rtol=1e-5)
    assert np.array_equal(in_gguf_order("model.layers.0.self_attn.v_proj.weight", query, config), query)


def test_every_weight_has_a_name_of_llama_cpp_and_its_own_values(folders: dict[str, ModelFolders]) -> None:
    folder = folders["tiny_dense"].floats
    (file,) = folder.glob("*.safetensors")
    read = dict(read_bfloat16(file))
    for name, tensor in read_tensors(folder).items():
        assert np.array_equal(read.pop(name), tensor.float().numpy())
    assert not read
    names = {gguf_name(name) for name in read_tensors(folder)}
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    assert names == {"token_embd", "output_norm", "output", *(f"blk.{i}.{part}" for i in (0, 1) for part in parts)}


def test_the_gguf_file_holds_the_model(folders: dict[str, ModelFolders], tmp_path: Path) -> None:
    write_gguf(folders["tiny_dense"].floats, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    (embeddings,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    expected = read_tensors(folders["tiny_dense"].floats)["model.embed_tokens.weight"].float().numpy()
    found = gguf.quants.dequantize(embeddings.data, embeddings.tensor_type)
    blocks = np.abs(expected).reshape(-1, 32).max(axis=1).repeat(32).reshape(expected.shape)
    steps = blocks / 127
    assert (np.abs(found - expected) <= steps * (0.5 + 127 * 2.0**-11)).all()  # rounded; the scale, too, to fp16


def test_a_model_with_experts_is_not_written_as_gguf(folders: dict[str, ModelFolders], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type \(deepseek_v3\) must be llama; use a dense model"):
        write_gguf(folders["tiny_deepseek"].floats, tmp_path / "model.gguf")


class SlowModel(FakeModel):
    """Takes a few milliseconds for each token, so that its two places fill."""

    def write(self, *args: Any) -> torch.Tensor:
        time.sleep(0.005)
        return super().write(*args)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(SlowModel(), ServedTokenizer(), max_running=2, max_queued=2)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def question(engine: Engine) -> Iterator[Question]:
    card = ModelCard(model_id="tiny", digest="0", model_digest="0", kind="Checkpoint", integer_path=None, created=1)
    service = CompletionService(
        engine=engine,
        tokenizer=ServedTokenizer(),
        card=card,
        access=Access(keys=None, ledger=LocalLedger(), request_timeout_s=60),
        max_body_bytes=10_000,
    )
    with serving(service) as url:
        yield Question(url=url, headers={}, vocab_size=250, prompt_tokens=10, answer_tokens=10)


def test_first_tokens_are_timed_through_http_and_without(question: Question, engine: Engine) -> None:
    found = asyncio.run(measure_first_tokens(question, engine, requests=20))
    assert 0 < found["engine_p50_ms"] <= found["engine_p99_ms"]
    assert found["overhead_p50_ms"] == found["http_p50_ms"] - found["engine_p50_ms"]
    assert found["overhead_p99_ms"] == found["http_p99_ms"] - found["engine_p99_ms"]


def test_overload_is_answered_or_refused(question: Question) -> None:
    found = asyncio.run(measure_overload(question, num_places=2, num_queued=2, seconds=1.0, target_ttft_s=30.0))
    assert found["offered_per_s"] == pytest.approx(5 * found["peak_per_s"])  # everything was in time
    assert found["refused_at_peak"] == 0, "as many clients as there is room for"
    assert found["answered"] > 0 and found["refused"] > 0 and found["broken"] == 0
    assert 0 < found["refusal_p50_ms"] <= found["refusal_p99_ms"]
    assert found["goodput_of_peak"] == pytest.approx(found["goodput_per_s"] / found["peak_per_s"])


def test_an_endpoint_that_is_not_there_breaks_a_reply() -> None:
    question = Question(url="http://127.0.0.1:9", headers={}, vocab_size=9, prompt_tokens=1, answer_tokens=1)

    async def once() -> Reply:
        async with new_session(question) as session:
            return await ask(session, question, [1])

    reply = asyncio.run(once())
    assert (reply.status, reply.is_whole, reply.is_refused, reply.first_token_s) == (0, False, False, None)


def test_goodput_counts_whole_answers_in_time_after_the_warm_up() -> None:
    good = Reply(status=200, ended=105.0, total_s=1.0, first_token_s=0.5, is_whole=True)
    replies = [
        good,
        replace(good, first_token_s=2.5),
        replace(good, is_whole=False),
        replace(good, ended=101.9),
        replace(good, ended=110.0),
        replace(good, ended=102.0),
        replace(good, status=429, first_token_s=None, is_whole=False),
    ]
    assert goodput(replies, 100.0, 10.0, 2.0) == 2 / 8


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50.0, 99.0, 7.0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_front_part_measures_a_replica_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from jobs.bench.serving.front import PLACES, measure_front

    found = measure_front("proxy", requests=10, seconds=10.0)
    assert found["first_token"].keys() >= {"overhead_p50_ms", "overhead_p99_ms"}
    assert found["overload"]["broken"] == 0 and found["overload"]["refused"] > PLACES


@pytest.mark.gpu
def test_a_gpu_runs_ours_and_generate(tmp_path: Path) -> None:
    asked = work_for(Path(), device="cuda", concurrency=[1, 4])
    made = write_model(MODELS["tiny_deepseek"], tmp_path)
    for system in all_systems(NO_PYTHONS):
        if system.name in ("ours", "transformers"):
            assert len(run_system(system, made, asked)["rows"]) == 2
