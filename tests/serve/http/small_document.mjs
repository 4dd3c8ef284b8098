/** As much of a document as the page's code asks for, made from the ids in its HTML. It is no browser. */

import { resolveObjectURL } from "node:buffer";
import { readFileSync } from "node:fs";

class SmallElement extends EventTarget {
  textContent = "";
  hidden = false;
  disabled = false;
  children = [];
  files = [];
  parent = null;

  constructor(value = "") {
    super();
    this.value = this.initial = value;
  }

  append(child) {
    child.parent = this;
    this.children.push(child);
  }

  remove() {
    this.parent.children = this.parent.children.filter((child) => child !== this);
  }

  replaceChildren() {
    this.children = [];
  }

  click() {
    this.dispatchEvent(new Event("click", { cancelable: true }));
  }
}

/** Return the page as somebody opens it at `home`: what it holds, and what a person can do with it. */
export function openPage(page, file, home) {
  const html = readFileSync(file, "utf8");
  const elements = new Map();
  for (const [tag, id] of html.matchAll(/<[a-z]+\s[^>]*?\bid="([a-z-]+)"[^>]*>/g)) {
    const element = new SmallElement(/\bvalue="([^"]*)"/.exec(tag)?.[1]);
    element.hidden = /\shidden\b/.test(tag);
    element.disabled = /\sdisabled\b/.test(tag);
    elements.set(id, element);
  }
  for (const [whole, id] of html.matchAll(/<form id="([a-z-]+)"[\s\S]*?<\/form>/g)) {
    const inside = [...whole.matchAll(/\bid="([a-z-]+)"/g)].map(([, own]) => elements.get(own));
    elements.get(id).reset = () => inside.forEach((element) => (element.value = element.initial));
  }
  const kept = new Map();
  const storage = {
    getItem: (name) => kept.get(name) ?? null,
    setItem: (name, value) => kept.set(name, String(value)),
  };
  const links = [];
  const document = {
    getElementById: (id) => elements.get(id) ?? null,
    createElement: (tag) => {
      const element = new SmallElement();
      if (tag === "a") {
        links.push(element);
      }
      return element;
    },
  };
  page.start(document, storage, new URL(home));

  const byId = (id) => elements.get(id);
  const until = async (isSo) => {
    for (let tries = 0; !isSo(); tries++) {
      if (tries > 1000) {
        throw new Error(`waited in vain for ${isSo}; the page says: ${byId("error").textContent}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  return {
    byId,
    kept,
    until,
    type: (id, value) => {
      byId(id).value = value;
      byId(id).dispatchEvent(new Event("input"));
    },
    fire: (id, event) => byId(id).dispatchEvent(new Event(event, { cancelable: true })),
    downloaded: () => resolveObjectURL(links.at(-1).href).text(),
  };
}
