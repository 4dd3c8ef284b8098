"""`chat.toml` on a cluster, made small: from text to an endpoint that chats."""

import json

import openai
import pytest

from tests.end_to_end.conftest import BIN, Site

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

# The first three steps are the mini recipe's own, so that one run of them serves both; the mini model is served beside.
SMALL = [
    "--run_dir=runs/mini",
    "--clean.unit_bytes=65536",
    '--clean.inputs=[{glob = "text/*.jsonl*", id_column = "id", source = "test", licence = "CC0-1.0"}]',
    "--tokenizer.vocab_size=512",
    "--tokenize.validation_fraction=0.2",
    '--pretrain.model={preset = "tiny"}',
    "--pretrain.seq_len=128",
    "--pretrain.batch_tokens=1024",
    "--pretrain.micro_batch=4",
    "--pretrain.steps=4",
    "--pretrain.schedule.warmup_steps=1",
    '--tokenize_chat.inputs=[{glob = "chats.jsonl", source = "test", licence = "CC0-1.0"}]',
    "--tokenize_chat.validation_fraction=0.2",
    "--chat.seq_len=128",
    "--chat.batch_tokens=1024",
    "--chat.micro_batch=4",
    "--chat.steps=4",
    "--chat.schedule.warmup_steps=1",
    "--quantize_chat.gate_tokens=1024",
    "--quantize_chat.max_perplexity_ratio=1.05",
    "--quantize_chat.min_top1_agreement=0.8",
    "--serve_chat.app_name=chat",
    "--serve_chat.route_prefix=/chat",
]


@pytest.mark.shows("`chat.toml` takes text and conversations to a chat endpoint, which the openai client talks to")
def test_the_chat_recipe_runs_to_an_endpoint_that_chats(site: Site) -> None:
    chats = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is the number {i}."}]
        for i in range(80)
    ]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (site.folder / "chats.jsonl").write_text("".join(lines))
    # All steps in one job: one driver starts rather than eight.
    recipe = ["--recipe", "jobs/recipes/chat.toml", "--root", str(site.folder), f"--serve_chat.port={site.port}"]
    job = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.run_recipe"]
    result = site.run(*job, *recipe, *SMALL, timeout_s=560)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    for step in ("pretrain", "tokenize_chat", "chat", "quantize_chat", "serve_chat"):
        assert f"finished step={step} " in result.stdout

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{site.port}/chat/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == ["chat"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 7?"}]
    request = {"model": "chat", "messages": messages, "max_tokens": 16, "temperature": 0.7, "seed": 3}
    whole = client.chat.completions.create(**request)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
