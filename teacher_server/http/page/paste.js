// A prompt and a response as text or ids, for the teacher to analyse now.

import * as api from "./api.js";
import {el} from "./dom.js";
import {fromAnalysis} from "./rollout.js";

const USUAL_K = 16;
const USUAL_TEMPERATURE = 1;

export class PasteForm {
  /** `onAsk(words)` when the form is sent. */
  constructor(side, onAsk) {
    this.id = (name) => `paste-${side}-${name}`;
    this.text = {};
    const area = (name, label) => {
      this.text[name] = el("textarea", {id: this.id(name), required: true, spellcheck: "false"});
      return el("div", {}, el("label", {for: this.id(name), text: label}), this.text[name]);
    };
    const kind = (value, text, checked) => el("label", {},
      el("input", {type: "radio", name: this.id("kind"), value, checked}), ` ${text}`);
    this.kinds = el("fieldset", {class: "choices"}, el("legend", {text: "Given as"}),
      kind("text", "text", true), kind("ids", "token ids", false));
    this.k = this.#field("k", {type: "number", min: 1, value: USUAL_K, step: 1, required: true});
    this.temperature = this.#field("temperature",
      {type: "number", min: 0.001, max: 1000, value: USUAL_TEMPERATURE, step: "any", required: true});
    this.candidates = el("textarea", {id: this.id("candidates"), spellcheck: "false",
      placeholder: "[[12, 7, 9], [3, 5, 1]]"});
    this.go = el("button", {class: "go", text: "Analyse"});
    this.note = el("p", {class: "hint", role: "status"});
    this.root = el("form", {class: "card", onsubmit: (event) => { event.preventDefault(); onAsk(this.words()); },
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.root.requestSubmit();
      }},
      el("div", {class: "texts"}, area("prompt", "Prompt"), area("response", "Response")),
      el("details", {}, el("summary", {text: "The student's candidates"}),
        el("label", {for: this.id("candidates"),
          text: "Its own top ids, a JSON list with one row a response token: the overlap is of these"}),
        this.candidates),
      el("div", {class: "row"}, this.kinds,
        el("label", {for: this.id("k")}, "Top-K", this.k),
        el("label", {for: this.id("temperature")}, "Temperature", this.temperature), this.go),
      this.note);
  }

  #field(name, attributes) { return el("input", {id: this.id(name), ...attributes}); }

  /** What the server can do. */
  limit(info) {
    this.info = info;
    this.k.max = info.max_k;
    this.k.value = Math.min(Number(this.k.value), info.max_k);
    const text = this.kinds.querySelector("[value=text]");
    text.disabled = !info.has_tokenizer;
    if (!info.has_tokenizer) this.kinds.querySelector("[value=ids]").checked = true;
  }

  words() {
    return {
      prompt: this.text.prompt.value, response: this.text.response.value,
      ids: this.kinds.querySelector("[value=ids]").checked ? "1" : undefined,
      temperature: Number(this.temperature.value), topk: Number(this.k.value),
    };
  }

  /** What a link says; where it says a text, all else of it is said too, or as usual. */
  fill({prompt, response, ids, temperature, topk}) {
    if (prompt !== undefined) this.text.prompt.value = prompt;
    if (response !== undefined) this.text.response.value = response;
    if (prompt === undefined && response === undefined) return;
    this.kinds.querySelector(ids ? "[value=ids]" : "[value=text]").checked = true;
    this.temperature.value = temperature ?? USUAL_TEMPERATURE;
    this.k.value = topk ?? USUAL_K;
  }

  /** The teacher's analysis. Raises Refused, and Error for what is no list of ids. */
  async ask(words) {
    const body = {temperature: Number(this.temperature.value), k: Number(this.k.value)};
    for (const name of ["prompt", "response"]) {
      if (words.ids) body[`${name}_ids`] = idsIn(words[name], name);
      else body[name] = words[name];
    }
    const candidates = this.candidates.value.trim();
    if (candidates) body.candidate_ids = rowsIn(candidates);
    this.note.textContent = "";
    this.go.disabled = true;
    try {
      return fromAnalysis(await this.#fitting(body), this.info?.special_token_ids ?? []);
    } finally {
      this.go.disabled = false;
    }
  }

  /** Asks; where the reply would be too large, again with the largest k that fits, and says so. */
  async #fitting(body) {
    if (body.response_ids) this.#fit(body, body.response_ids.length);
    try {
      return await api.analyze(body);
    } catch (error) {
      const told = /(\d+) response tokens/.exec(error.message ?? "");
      if (error.status !== 400 || told === null || !this.#fit(body, Number(told[1]))) throw error;
      return await api.analyze(body);
    }
  }

  /** Lowers k to what one reply holds; false where it holds it already, or no k would do. */
  #fit(body, numTokens) {
    const perToken = Math.floor(this.info.max_analysis_entries / numTokens);
    const k = perToken - (body.candidate_ids?.[0]?.length ?? 0);
    if (k < 1 || k >= body.k) return false;
    body.k = k;
    this.#say(k, numTokens);
    return true;
  }

  #say(k, numTokens) {
    this.note.textContent = `Top-K is ${k} here: that is as much as one reply holds for ${
      numTokens.toLocaleString("en")} tokens.`;
  }
}

function idsIn(text, name) {
  return (text.match(/[^\s,[\]]+/g) ?? []).map((word) => {
    if (!/^\d+$/.test(word)) throw new Error(`"${word.slice(0, 40)}" in the ${name} is not a token id`);
    return Number(word);
  });
}

function rowsIn(text) {
  let rows = null;
  try { rows = JSON.parse(text); } catch { /* said below */ }
  if (!Array.isArray(rows) || !rows.every((row) => Array.isArray(row) && row.every(Number.isInteger))) {
    throw new Error("the candidates must be a JSON list of lists of token ids");
  }
  return rows;
}
