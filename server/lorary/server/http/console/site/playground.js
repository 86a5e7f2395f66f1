// One prompt through several adapters at once. Each column is a call of its own; the server batches them.

import { stream } from "./api.js";
import { $, el, say, setText } from "./dom.js";
import { number, seconds, short } from "./format.js";

const MAX_COLUMNS = 3;

export class Playground {
  constructor() {
    this.columns = [];
    this.isFilled = false;
    this.stopper = null;
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("add").addEventListener("click", () => this.add("").ref.focus());
  }

  /** Offer the refs that there are; the first time, choose some. */
  show(state) {
    const named = state.adapters.flatMap(({ name, versions }) => [
      ...versions.flatMap((version) => version.aliases.map((alias) => `${name}@${alias}`)),
      ...versions.map((version) => `${name}@${version.version}`),
    ]);
    const refs = [...named, state.server.base];
    if (this.refs !== refs.join("\n")) {
      this.refs = refs.join("\n");
      $("refs").replaceChildren(...refs.map((ref) => el("option", { value: ref })));
    }
    if (this.isFilled) return;
    this.isFilled = true;
    const first = state.adapters.map(({ name, versions }) => {
      const alias = versions.flatMap((version) => version.aliases)[0];
      return alias ? `${name}@${alias}` : `${name}@${versions.at(-1).version}`;
    });
    for (const ref of [...first.slice(0, 2), state.server.base].slice(0, 3)) this.add(ref);
    while (this.columns.length < 2) this.add(state.server.base);
  }

  add(ref) {
    const column = new Column(ref, () => this.remove(column));
    this.columns.push(column);
    $("answers").append(column.node);
    this.showNumber();
    return column;
  }

  remove(column) {
    column.stop();
    column.node.remove();
    this.columns = this.columns.filter((one) => one !== column);
    this.showNumber();
  }

  showNumber() {
    $("add").disabled = this.columns.length >= MAX_COLUMNS;
    this.columns.forEach((column, i) => column.setPlace(i + 1, this.columns.length > 2));
  }

  async run() {
    this.stop();
    const stopper = (this.stopper = new AbortController());
    $("stop").disabled = false;
    say("Running.");
    const question = {
      prompt: $("prompt").value,
      form: $("form").value,
      max_tokens: $("max-tokens").valueAsNumber,
      temperature: $("temperature").valueAsNumber,
      seed: $("seed").value === "" ? null : $("seed").valueAsNumber,
    };
    await Promise.all(this.columns.map((column) => column.run(question, stopper.signal)));
    if (this.stopper !== stopper) return; // another one runs by now
    this.stopper = null;
    $("stop").disabled = true;
    this.columns.forEach((column, i) => column.compare(this.columns.slice(0, i)));
    say(this.columns.map((column, i) => `Column ${i + 1}: ${column.status.textContent}`).join(" "));
  }

  stop() {
    this.stopper?.abort();
  }
}

class Column {
  constructor(ref, onRemove) {
    this.stopper = null;
    this.label = el("span", { class: "hidden" });
    this.ref = el("input", { list: "refs", value: ref, autocomplete: "off", spellcheck: "false", placeholder: "the bare base" });
    this.close = el("button", { class: "quiet small", type: "button", click: onRemove }, "Remove");
    this.receipt = el("p", { class: "receipt" });
    this.text = el("div", { class: "text", tabindex: "0", role: "region" });
    this.status = el("p", { class: "status muted" });
    this.node = el(
      "article",
      { class: "panel column" },
      el("div", { class: "ref" }, el("label", {}, this.label, this.ref), this.close),
      this.receipt,
      this.text,
      this.status,
    );
  }

  setPlace(place, isRemovable) {
    setText(this.label, `Adapter of column ${place}`);
    this.text.setAttribute("aria-label", `Answer of column ${place}`);
    this.close.setAttribute("aria-label", `Remove column ${place}`);
    this.close.hidden = !isRemovable;
  }

  stop() {
    this.stopper?.abort();
  }

  async run(question, signal) {
    const stopper = (this.stopper = new AbortController());
    this.isWhole = false;
    const either = AbortSignal.any([signal, stopper.signal]);
    this.text.replaceChildren();
    this.text.setAttribute("aria-busy", "true");
    this.receipt.replaceChildren();
    this.status.className = "status muted";
    setText(this.status, "waiting…");
    const meter = new Meter();
    try {
      const [path, body] = asked(this.ref.value.trim(), question);
      for await (const { headers, event } of stream(path, body, either)) {
        either.throwIfAborted(); // more of it may be here already
        if (headers) this.showReceipt(headers);
        else this.take(event, meter);
      }
      this.finish(meter);
    } catch (error) {
      if (this.stopper !== stopper) return; // the next question is shown here by now
      this.status.className = error.name === "AbortError" ? "status muted" : "status problem";
      setText(this.status, error.name === "AbortError" ? `stopped after ${meter.live()}` : error.message);
    }
    this.text.removeAttribute("aria-busy");
  }

  showReceipt(headers) {
    const digest = headers.get("x-lorary-digest");
    const name = headers.get("x-lorary-adapter");
    const version = headers.get("x-lorary-version");
    this.receipt.append(
      digest && name ? `${name}@${version} ` : digest ? "several adapters " : "the bare base",
      digest ? el("code", { title: digest }, short(digest)) : "",
    );
  }

  take(event, meter) {
    const [choice] = event.choices;
    if (choice) {
      const text = choice.delta ? choice.delta.content : choice.text;
      if (text) {
        this.text.append(text);
        meter.count();
        setText(this.status, meter.live());
      }
    }
    if (event.lorary) meter.receipt = event.lorary;
    if (event.usage) meter.usage = event.usage;
  }

  /** Say that an earlier column answered the same. */
  compare(earlier) {
    const place = earlier.findIndex((one) => one.isWhole && one.text.textContent === this.text.textContent) + 1;
    if (this.isWhole && place) setText(this.status, `${this.status.textContent} · same as column ${place}`);
  }

  finish({ receipt, usage }) {
    this.isWhole = true;
    const { completion_tokens: written, prompt_tokens: read } = usage;
    const parts = [`${written} tokens after ${read}`];
    // The first comes out of reading; the others are what writing took.
    if (written > 1) parts.push(`${number((written - 1) / (receipt.decode_ms / 1000))} tokens/s`);
    const waited = receipt.queue_ms + receipt.prefill_ms;
    parts.push(`first after ${seconds(waited / 1000)}`);
    if (receipt.adapter_load_ms >= 1) parts.push(`loaded in ${seconds(receipt.adapter_load_ms / 1000)}`);
    setText(this.status, parts.join(" · "));
  }
}

/** What a stream has come to while it runs: chunks stand for tokens until the server says how many there were. */
class Meter {
  constructor() {
    this.chunks = 0;
    this.receipt = null;
    this.usage = null;
  }

  count() {
    this.chunks += 1;
    this.firstMs ??= performance.now();
  }

  live() {
    const passedS = (performance.now() - this.firstMs) / 1000;
    const rate = this.chunks > 1 && passedS > 0 ? ` · ${number((this.chunks - 1) / passedS)} tokens/s` : "";
    return `${this.chunks} pieces${rate}`;
  }
}

/** Return the path and the body of OpenAI's API that ask this question. */
function asked(ref, { prompt, form, max_tokens, temperature, seed }) {
  const common = { model: ref, max_tokens, temperature, seed, stream: true, stream_options: { include_usage: true } };
  if (form === "raw") return ["completions", { ...common, prompt }];
  const messages = [{ role: "user", content: prompt }];
  return ["chat/completions", { ...common, messages, use_chat_template: form === "chat" }];
}
