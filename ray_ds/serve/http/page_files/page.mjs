/**
 * The page: chat, and blind comparison. First what needs no document, so that it runs outside a browser too.
 *
 * An endpoint is {url, key}: a URL that ends in a slash, below which the API is, and a key or "".
 * A question is {prompt, seed, temperature, max_tokens, answers}, with the answers of two models.
 * A rating is a line of the file that `evaluate.ratings` names: ray_ds/evaluate/ratings.py says what it holds.
 */

export const SIDES = ["left", "right"];
export const SCALES = ["fluency", "logic", "accuracy"];
const SEEDS = 2 ** 31;

/** Return the endpoint at a path of the address that the page came from, the only one it may talk to. */
export function endpointAt(path, key, home) {
  const url = new URL(path, home);
  if (url.origin !== home.origin) {
    throw new Error(`${path} must be a path at ${home.origin}, such as /other; serve both models there`);
  }
  url.pathname = url.pathname.replace(/\/*$/, "/");
  url.search = url.hash = "";
  return { url, key };
}

async function call({ url, key }, path, { body, signal } = {}) {
  const response = await fetch(new URL(path, url), {
    method: body === undefined ? "GET" : "POST",
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
  if (!response.ok) {
    throw new Error(reasonIn(await response.text()) ?? `${url.pathname}${path} answers ${response.status}`);
  }
  return response;
}

function reasonIn(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return undefined;
  }
}

/** Return what `/health` says of the model behind an endpoint. */
export async function healthOf(endpoint) {
  return (await call(endpoint, "health")).json();
}

/** Yield the data of each server-sent event in a stream of bytes. */
export async function* eventsIn(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        yield event.replace(/^data: /, "");
      }
    }
  } finally {
    await reader.cancel();
  }
}

/** Return a conversation as the beginning of a text, for a model that has no chat template and only goes on. */
export function asText(messages) {
  return messages.map(({ role, content }) => (role === "user" ? content : `${content}\n`)).join("");
}

/** Yield an answer piece by piece. */
export async function* answerTo(messages, endpoint, isChat, sampling, signal) {
  const path = isChat ? "v1/chat/completions" : "v1/completions";
  const asked = isChat ? { messages } : { prompt: asText(messages) };
  const response = await call(endpoint, path, { body: { ...asked, ...sampling, stream: true }, signal });
  for await (const data of eventsIn(response.body)) {
    if (data === "[DONE]") {
      return;
    }
    const event = JSON.parse(data);
    if (event.error) {
      throw new Error(event.error.message);
    }
    for (const choice of event.choices) {
      yield isChat ? choice.delta.content : choice.text;
    }
  }
  throw new Error("the answer broke off; ask again");
}

async function wholeAnswer(prompt, endpoint, sampling) {
  const health = await healthOf(endpoint);
  const isChat = health.has_chat_template;
  let text = "";
  for await (const piece of answerTo([{ role: "user", content: prompt }], endpoint, isChat, sampling)) {
    text += piece;
  }
  if ((await healthOf(endpoint)).digest !== health.digest) {
    throw new Error("a model was replaced while it answered; ask again");
  }
  return {
    model_id: health.model,
    model_digest: health.model_digest,
    endpoint_digest: health.digest,
    is_chat: isChat,
    text,
  };
}

/** Return a question with both answers; neither is shown before the other, as who is quicker would give it away. */
export async function ask(prompt, endpoints, sampling) {
  const answers = await Promise.all(endpoints.map((endpoint) => wholeAnswer(prompt, endpoint, sampling)));
  if (answers[0].model_digest === answers[1].model_digest) {
    throw new Error("both paths serve the same model; name the path of another");
  }
  return { prompt, ...sampling, answers };
}

/** Return the answers by side. */
export function drawSides({ answers }, isSwapped) {
  return isSwapped ? { left: answers[1], right: answers[0] } : { left: answers[0], right: answers[1] };
}

/** Return a rating: `scores[side][scale]` is 1 to 5, `preferred` a side or "neither". */
export function rate({ prompt, seed, temperature, max_tokens }, sides, rater, scores, preferred) {
  const [left, right] = SIDES.map((side) => ({ ...sides[side], ...scores[side] }));
  return { rater, prompt, seed, temperature, max_tokens, left, right, preferred };
}

/** Return the questions behind the ratings in a file, each once and without anybody's scores. */
export function questionsIn(jsonl) {
  const questions = new Map();
  for (const line of jsonl.split("\n").filter((line) => line.trim())) {
    const { prompt, seed, temperature, max_tokens, left, right } = JSON.parse(line);
    const answers = [left, right].map(withoutScores);
    answers.sort((one, other) => (one.model_digest < other.model_digest ? -1 : 1));
    const identity = JSON.stringify([prompt, answers.map(({ model_digest, text }) => [model_digest, text])]);
    questions.set(identity, { prompt, seed, temperature, max_tokens, answers });
  }
  return [...questions.values()];
}

function withoutScores({ model_id, model_digest, endpoint_digest, is_chat, text }) {
  return { model_id, model_digest, endpoint_digest, is_chat, text };
}

function randomBelow(limit) {
  return crypto.getRandomValues(new Uint32Array(1))[0] % limit;
}

/** Bring the document to life. */
export function start(document, storage, home) {
  const byId = (id) => document.getElementById(id);
  const show = (id, text) => (byId(id).textContent = text);
  const endpoint = () => endpointAt("", byId("key").value, home);
  const sampling = () => ({
    seed: randomBelow(SEEDS),
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value),
  });

  /** Run an action for an event, and show why it failed if it does. */
  const on = (id, event, action) =>
    byId(id).addEventListener(event, async (happened) => {
      happened.preventDefault();
      byId("error").hidden = true;
      try {
        await action();
      } catch (error) {
        show("error", error.message);
        byId("error").hidden = false;
      }
    });

  for (const id of ["key", "second-key"]) {
    byId(id).value = storage.getItem(`ray_ds.${id}`) ?? "";
    byId(id).addEventListener("input", () => storage.setItem(`ray_ds.${id}`, byId(id).value));
  }
  healthOf(endpoint()).then(
    (health) => show("served", `${health.model}, ${health.kind} ${health.model_digest}`),
    (error) => show("served", error.message),
  );
  startChat({ document, byId, on, endpoint, sampling });
  startComparison({ document, storage, home, byId, show, on, sampling });
}

function startChat({ document, byId, on, endpoint, sampling }) {
  let messages = [];
  let stopping = new AbortController();

  const addLine = (role, content) => {
    const line = document.createElement("li");
    line.className = role;
    line.textContent = content;
    byId("chat-log").append(line);
    return line;
  };
  const setBusy = (isBusy) => {
    byId("chat-send").disabled = byId("chat-new").disabled = isBusy;
    byId("chat-stop").disabled = !isBusy;
  };

  on("chat-form", "submit", async () => {
    const asked = [...messages, { role: "user", content: byId("chat-text").value }];
    stopping = new AbortController();
    const { signal } = stopping;
    setBusy(true);
    const question = addLine("user", byId("chat-text").value);
    const line = addLine("assistant", "");
    try {
      const isChat = (await healthOf(endpoint())).has_chat_template;
      for await (const piece of answerTo(asked, endpoint(), isChat, sampling(), signal)) {
        line.textContent += piece;
      }
    } catch (error) {
      if (!signal.aborted) {
        question.remove();
        line.remove();
        throw error;
      }
    } finally {
      setBusy(false);
    }
    messages = [...asked, { role: "assistant", content: line.textContent }];
    byId("chat-text").value = "";
  });
  on("chat-stop", "click", () => stopping.abort());
  on("chat-new", "click", () => {
    messages = [];
    byId("chat-log").replaceChildren();
  });
}

function startComparison({ document, storage, home, byId, show, on, sampling }) {
  const waiting = [];
  let current;
  let sides;

  const readRatings = () => storage.getItem("ray_ds.ratings") ?? "";
  const keepRatings = (jsonl) => {
    storage.setItem("ray_ds.ratings", jsonl);
    show("saved", `${jsonl.split("\n").length - 1} ratings are kept in this tab until it is closed.`);
  };
  const showNext = () => {
    current = waiting.shift();
    byId("rating-form").reset();
    byId("rating-form").hidden = current === undefined;
    if (current === undefined) {
      return;
    }
    sides = drawSides(current, randomBelow(2) === 1);
    show("shown-prompt", current.prompt);
    SIDES.forEach((side) => show(`${side}-text`, sides[side].text));
  };

  byId("first-path").value = home.pathname;
  keepRatings(readRatings());

  on("ask-form", "submit", async () => {
    const key = byId("key").value;
    const endpoints = [
      endpointAt(byId("first-path").value, key, home),
      endpointAt(byId("second-path").value, byId("second-key").value || key, home),
    ];
    byId("ask").disabled = true;
    try {
      waiting.push(await ask(byId("prompt").value, endpoints, sampling()));
    } finally {
      byId("ask").disabled = false;
    }
    if (current === undefined) {
      show("revealed", "");
      showNext();
    }
  });
  on("file", "change", async () => {
    for (const file of byId("file").files) {
      waiting.push(...questionsIn(await file.text()));
    }
    if (current === undefined) {
      showNext();
    }
  });
  on("rating-form", "submit", () => {
    const rater = byId("rater").value.trim();
    if (!rater) {
      throw new Error("a rating needs your name");
    }
    const scoresOf = (side) => SCALES.map((scale) => [scale, Number(byId(`${side}-${scale}`).value)]);
    const scores = Object.fromEntries(SIDES.map((side) => [side, Object.fromEntries(scoresOf(side))]));
    const rating = rate(current, sides, rater, scores, byId("preferred").value);
    keepRatings(`${readRatings()}${JSON.stringify(rating)}\n`);
    const named = SIDES.map((side) => `${side} was ${sides[side].model_id} (${sides[side].model_digest})`);
    show("revealed", `Saved. Of the answers just rated, ${named.join(", ")}.`);
    showNext();
  });
  on("skip", "click", showNext);
  on("download", "click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([readRatings()], { type: "application/jsonl" }));
    link.download = `ratings-${byId("rater").value.trim() || "unnamed"}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
  on("clear", "click", () => {
    if (confirm("Forget the ratings kept in this tab?")) {
      keepRatings("");
    }
  });
}

if (globalThis.document !== undefined) {
  start(document, sessionStorage, new URL("..", import.meta.url));
}
