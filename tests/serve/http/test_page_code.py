"""The page's code, run by Node against live endpoints, with a small stand-in for the document where it needs one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from ray_ds.evaluate.rating_scores import summarise_ratings
from ray_ds.evaluate.ratings import read_ratings
from ray_ds.serve.http import page

FILES = Path(page.__file__).parent / "page_files"
HERE = Path(__file__).parent


def run_node(code: str, *inputs: str) -> Any:
    """Return what a function's body returns, as JSON.

    Args:
        code: sees the page's module as `page`, `openPage` and `inputs`.
    """
    script = f"""
        import * as page from {json.dumps((FILES / "page.mjs").as_uri())};
        import {{ openPage }} from {json.dumps((HERE / "small_document.mjs").as_uri())};
        const found = await (async (...inputs) => {{ {code} }})(...process.argv.slice(1));
        console.log(JSON.stringify(found));
        process.exit(0);
    """
    command = ["node", "--input-type=module", "--eval", script, "--", *inputs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_events_are_read_whole_wherever_the_stream_is_cut() -> None:
    found = run_node("""
        const bytes = new TextEncoder().encode("data: {\\"a\\": \\"ü😀\\"}\\n\\ndata: [DONE]\\n\\ndata: cut off");
        const results = [];
        for (let size = 1; size <= bytes.length; size++) {
          const stream = new ReadableStream({
            start(controller) {
              for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
              controller.close();
            },
          });
          const events = [];
          for await (const event of page.eventsIn(stream)) events.push(event);
          results.push(JSON.stringify(events));
        }
        return [...new Set(results)];
    """)
    assert [json.loads(own) for own in found] == [['{"a": "ü😀"}', "[DONE]"]]


def test_a_key_goes_to_no_other_address() -> None:
    found = run_node("""
        const home = new URL("https://here:8000/a/");
        const at = (path) => {
          try { return page.endpointAt(path, "k", home).url.href } catch (error) { return error.message }
        };
        return ["", "/b", "/b/c/?x=1#y", "/x/..//evil.org", "//evil.org/b", "https://here:8000/b", "https://here/b",
                "http://here:8000/b", "javascript:alert(1)", "data:,x"].map(at);
    """)
    assert found[:4] == [
        "https://here:8000/a/",
        "https://here:8000/b/",
        "https://here:8000/b/c/",
        "https://here:8000//evil.org/",
    ]
    assert found[5] == "https://here:8000/b/"
    for refused in (4, 6, 7, 8, 9):
        assert "must be a path at https://here:8000" in found[refused]


ALL_OF = "let text = ''; for await (const piece of page.answerTo(messages, endpoint, isChat, sampling)) text += piece;"


def test_a_streamed_answer_is_the_apis_whole_one(both: str, api_key: str) -> None:
    messages = [{"role": "user", "content": "Wer?"}]
    sampling = {"seed": 3, "temperature": 0.5, "max_tokens": 20}
    client = httpx.Client(headers={"Authorization": f"Bearer {api_key}"})
    for url, is_chat in ((f"{both}/a", True), (f"{both}/b", False)):
        path, asked = (
            ("v1/chat/completions", {"messages": messages}) if is_chat else ("v1/completions", {"prompt": "Wer?"})
        )
        choice = client.post(f"{url}/{path}", json={**asked, **sampling}).json()["choices"][0]
        found = run_node(
            f"""
            const [home, key, messages, isChat, sampling] = [inputs[0], inputs[1], ...inputs.slice(2).map(JSON.parse)];
            const endpoint = page.endpointAt("", key, new URL(home));
            {ALL_OF} return text;
            """,
            f"{url}/", api_key, json.dumps(messages), json.dumps(is_chat), json.dumps(sampling),
        )  # fmt: skip
        assert found == (choice["message"]["content"] if is_chat else choice["text"]) != ""


def test_errors_are_the_apis_own_words(both: str, api_key: str) -> None:
    code = f"""
        const [messages, isChat, sampling] = [[{{ role: "user", content: "a" }}], true, {{ max_tokens: 1 }}];
        const endpoint = page.endpointAt("", inputs[1], new URL(inputs[0]));
        try {{ {ALL_OF} }} catch (error) {{ return error.message; }}
    """
    assert run_node(code, f"{both}/a/", "wrong").startswith("missing or wrong API key; send it as")
    assert "chat template" in run_node(code, f"{both}/b/", api_key)


def test_a_conversation_as_a_text() -> None:
    found = run_node("""
        const said = [["user", "In the"], ["assistant", " beginning"], ["user", "And then"]];
        return page.asText(said.map(([role, content]) => ({ role, content })));
    """)
    assert found == "In the beginning\nAnd then"


RATE = """
    const rate = async (own, rater, betterText) => {
      own.type("rater", ` ${rater} `);
      const isLeft = own.byId("left-text").textContent === betterText;
      for (const side of page.SIDES) {
        const isBetter = (side === "left") === isLeft;
        for (const scale of page.SCALES) own.type(`${side}-${scale}`, isBetter ? "5" : "2");
      }
      own.type("preferred", isLeft ? "left" : "right");
      own.fire("rating-form", "submit");
      await own.until(() => own.byId("revealed").textContent !== "");
      own.fire("download", "click");
      return own.downloaded();
    };
"""


@pytest.mark.shows("The page's blind ratings by two people are read into a report, with their agreement")
def test_two_people_rate_the_same_answers_blindly(both: str, api_key: str, tmp_path: Path) -> None:
    found = run_node(
        f"""
        const [file, url, key] = inputs;
        {RATE}
        const anna = openPage(page, file, `${{url}}/a/`);
        anna.type("key", key);
        anna.type("second-path", "/b");
        anna.type("prompt", "Warum?");
        anna.type("max-tokens", "12");
        anna.fire("ask-form", "submit");
        await anna.until(() => !anna.byId("rating-form").hidden);
        const told = ["shown-prompt", "revealed", "error", "saved"].map((id) => anna.byId(id).textContent);
        const better = anna.byId("left-text").textContent;
        const first = await rate(anna, "anna", better);
        const bert = openPage(page, file, `${{url}}/a/`);
        bert.byId("file").files = [new Blob([first])];
        bert.fire("file", "change");
        await bert.until(() => !bert.byId("rating-form").hidden);
        const second = await rate(bert, "bert", better);
        const [revealed, hidden] = [anna.byId("revealed").textContent, anna.byId("rating-form").hidden];
        return {{ told, first, second, revealed, hidden }};
        """,
        str(FILES / "page.html"),
        both,
        api_key,
    )
    assert found["told"] == ["Warum?", "", "", "0 ratings are kept in this tab until it is closed."]
    assert found["hidden"] and "team/tiny (fedcba9876543210)" in found["revealed"]
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text(found[name])
    first, second = read_ratings(f"{tmp_path}/*.jsonl", "ratings")
    assert (first.rater, second.rater, first.prompt, first.max_tokens) == ("anna", "bert", "Warum?", 12)
    assert first.pair == second.pair and first.seed == second.seed
    by_model = {own.model_digest: own for own in first.answers}
    assert set(by_model) == {"fedcba9876543210", "other"}
    for digest, path, asked in (
        ("fedcba9876543210", "a/v1/chat/completions", {"messages": [{"role": "user", "content": "Warum?"}]}),
        ("other", "b/v1/completions", {"prompt": "Warum?"}),
    ):
        body = {**asked, "seed": first.seed, "temperature": first.temperature, "max_tokens": 12}
        headers = {"Authorization": f"Bearer {api_key}"}
        choice = httpx.post(f"{both}/{path}", json=body, headers=headers).json()["choices"][0]
        assert by_model[digest].text == (choice["message"]["content"] if "messages" in asked else choice["text"])
    summary = summarise_ratings([first, second], "other", "ratings")
    is_better = first.preferred_answer is not None and first.preferred_answer.model_digest == "other"
    assert summary["scores"]["logic"]["score"] == (5 if is_better else 2)
    assert summary["agreement"][0]["raters"] == ["anna", "bert"]
    assert summary["agreement"][0]["kappas"]["logic"]["score"] == 1.0


def test_sides_are_drawn_by_lot() -> None:
    found = run_node(
        """
        const [left, right] = ["a", "b"].map((name) => ({ model_digest: name, text: name }));
        const line = JSON.stringify({ prompt: "p", left, right });
        globalThis.fetch = () => Promise.reject(new Error("nobody is there"));
        let onLeft = 0;
        for (let i = 0; i < 400; i++) {
          const own = openPage(page, inputs[0], "http://here/");
          own.byId("file").files = [new Blob([line])];
          own.fire("file", "change");
          await own.until(() => !own.byId("rating-form").hidden);
          onLeft += own.byId("left-text").textContent === "a";
        }
        return onLeft;
        """,
        str(FILES / "page.html"),
    )
    assert 140 < found < 260  # six standard deviations of a fair coin


def test_a_chat_goes_on_and_keeps_its_key_in_the_tab_only(both: str, api_key: str) -> None:
    found = run_node(
        """
        const [file, url, key] = inputs;
        const own = openPage(page, file, `${url}/a/`);
        const log = () => own.byId("chat-log").children.map((line) => [line.className, line.textContent]);
        const say = async (text) => {
          own.type("chat-text", text);
          own.fire("chat-form", "submit");
          await own.until(() => own.byId("chat-send").disabled === false);
          return log();
        };
        own.type("temperature", "0");
        own.type("max-tokens", "8");
        const refused = [await say("Hallo"), own.byId("error").textContent];
        own.type("key", key);
        return [refused, await say("Hallo"), await say("Weiter"), [...own.kept], own.byId("served").textContent];
        """,
        str(FILES / "page.html"),
        both,
        api_key,
    )
    (log, error), first, second, kept, served = found
    assert log == [] and error.startswith("missing or wrong API key")
    assert [role for role, _ in second] == ["user", "assistant", "user", "assistant"] and second[:2] == first
    messages = [{"role": role, "content": content} for role, content in second[:3]]
    headers = {"Authorization": f"Bearer {api_key}"}
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    choice = httpx.post(f"{both}/a/v1/chat/completions", json=body, headers=headers).json()["choices"][0]
    assert second[3] == ["assistant", choice["message"]["content"]]
    assert dict(kept)["ray_ds.key"] == api_key
    assert served == "team/tiny, QuantizedModel fedcba9876543210"


STAND_INS = """
    const health = (digest) => ({ model: "m", model_digest: "m1", digest, has_chat_template: false });
    const json = (value) => new Response(JSON.stringify(value));
    const piece = new TextEncoder().encode(`data: {"choices": [{"text": "so far"}]}\\n\\n`);
    const done = new TextEncoder().encode("data: [DONE]\\n\\n");
"""


def test_a_stopped_answer_keeps_what_was_written() -> None:
    found = run_node(
        STAND_INS
        + """
        globalThis.fetch = async (url, { signal }) => {
          if (url.pathname === "/health") return json(health("e1"));
          return new Response(new ReadableStream({
            start(controller) {
              controller.enqueue(piece);
              signal.addEventListener("abort", () => controller.error(signal.reason));
            },
          }));
        };
        const own = openPage(page, inputs[0], "http://here/");
        const written = () => own.byId("chat-log").children.map((line) => line.textContent);
        own.type("chat-text", "Go");
        own.fire("chat-form", "submit");
        await own.until(() => written().at(-1) === "so far");
        const whileBusy = [own.byId("chat-send").disabled, own.byId("chat-stop").disabled];
        own.fire("chat-stop", "click");
        await own.until(() => own.byId("chat-send").disabled === false);
        return [whileBusy, written(), own.byId("error").textContent];
        """,
        str(FILES / "page.html"),
    )
    assert found == [[True, False], ["Go", "so far"], ""]


def test_answers_that_cannot_be_compared_are_refused() -> None:
    found = run_node(
        STAND_INS
        + """
        const endpoints = ["/a", "/b"].map((path) => page.endpointAt(path, "", new URL("http://here/")));
        const asking = async (answers) => {
          let number = 0;
          globalThis.fetch = async (url) => {
            if (url.pathname.endsWith("health")) return json(answers(number++));
            return new Response(new Blob(url.pathname.startsWith(broken) ? [piece] : [piece, done]));
          };
          return page.ask("p", endpoints, {}).then(() => "taken", (error) => error.message);
        };
        let broken = "nowhere";
        const results = [await asking(() => health("e1")), await asking((number) => health(`e${number}`))];
        broken = "/b";
        return [...results, await asking(() => health("e1"))];
        """
    )
    assert found == [
        "both paths serve the same model; name the path of another",
        "a model was replaced while it answered; ask again",
        "the answer broke off; ask again",
    ]
