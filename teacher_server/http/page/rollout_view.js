// One rollout: its numbers, the policy, the chart, the coloured tokens, the token that is looked at.

import * as colours from "./colours.js";
import * as api from "./api.js";
import {Chart} from "./chart.js";
import {Controls} from "./controls.js";
import {count, el, facts, modelName, number, onceAFrame} from "./dom.js";
import {judged} from "./drift.js";
import {csv, save} from "./exports.js";
import {Inspector} from "./inspector.js";
import {TokensView} from "./tokens_view.js";

const POLICY = ["metric", "k", "threshold", "top_p", "w_drop"];

export class RolloutView {
  /** `onState(patch)` for what the link should say of how the rollout is shown. */
  constructor(side, onState) {
    this.side = side;
    this.onState = onState;
    this.hovered = null;
    this.stats = el("div");
    this.warnings = el("ul", {class: "warnings"});
    this.controls = new Controls(`policy-${side}`, (policy) => this.#policySet(policy));
    const touched = {onChoose: (t) => this.choose(t), onHover: (t) => this.#hover(t)};
    this.chart = new Chart(touched);
    this.tokens = new TokensView("Response tokens; arrow keys move between them", touched);
    this.inspector = new Inspector(side);
    this.prompt = el("p", {class: "prompt", tabindex: "0", role: "region", "aria-label": "Prompt"});
    this.redraw = onceAFrame(() => this.#judge());
    this.root = el("section", {class: "rollout", "aria-label": "Rollout"},
      this.stats, this.warnings, this.controls.root, this.chart.root, this.#colourBar(),
      el("details", {class: "prompt-box"}, el("summary", {text: "Prompt"}), this.prompt),
      el("div", {class: "reading"}, this.tokens.root, this.inspector.root), this.#exports());
  }

  #colourBar() {
    const radio = (name) => el("label", {},
      el("input", {type: "radio", name: `colour-${this.side}`, value: name,
        onchange: () => { this.onState({colour: name}); this.#colour(name); }}),
      ` ${colours.measure(name).label}`);
    this.radios = el("fieldset", {class: "choices"}, el("legend", {text: "Colour by"}),
      ...colours.NAMES.map(radio));
    this.legend = el("div", {class: "legend", role: "group"});
    return el("div", {class: "colour-bar"}, this.radios, this.legend);
  }

  #exports() {
    const button = (text, work) => el("button", {type: "button", class: "quiet", text,
      onclick: () => work().catch((error) => { this.said.textContent = error.message; })});
    this.said = el("span", {role: "status"});
    this.parquet = button("Parquet", async () => save(
      await api.rolloutFile(this.place.run, this.place.step, this.place.index), this.#name("parquet")));
    return el("div", {class: "exports", role: "group", "aria-label": "Save"}, "Save as ",
      button("CSV", async () => save(csv(this.rollout, this.now), this.#name("csv"))),
      button("PNG", async () => save(await this.chart.png(), this.#name("png"))),
      this.parquet, this.said);
  }

  #name(extension) {
    const {run, step, index} = this.place;
    const name = run === undefined ? "response" : `${run}-step-${step}-rollout-${index}`;
    return `${name.replace(/[^\w.-]/g, "_")}.${extension}`;
  }

  /** Another rollout, from its beginning, as the state of its pane says. */
  show(rollout, state) {
    this.rollout = rollout;
    this.place = state;
    this.hovered = null;
    this.chosen = Math.min(rollout.T - 1, Math.max(0, state.t ?? 0));
    this.policy = policyOf(state, rollout);
    this.controls.show(rollout, this.policy);
    this.prompt.textContent = rollout.prompt;
    this.parquet.hidden = rollout.recorded === null;
    this.said.textContent = "";
    this.warnings.replaceChildren(...rollout.warnings.map((warning) =>
      el("li", {text: warning.message})));
    this.now = judged(this.policy, rollout);
    this.#offerColours(state.colour);
    this.tokens.show(rollout, this.chosen);
    this.#judge();
    this.choose(this.chosen, {quietly: true});
  }

  /** The same rollout, shown in another way: the link was changed. */
  restate(state) {
    this.place = state;
    this.policy = policyOf(state, this.rollout);
    this.controls.show(this.rollout, this.policy);
    this.#offerColours(state.colour);
    this.#judge();
    const t = Math.min(this.rollout.T - 1, Math.max(0, state.t ?? 0));
    if (t !== this.chosen) this.choose(t, {quietly: true});
  }

  #offerColours(wished) {
    const there = colours.NAMES.filter((name) => colours.has(name, this.rollout, this.now));
    this.colour = there.includes(wished) ? wished : there[0];
    for (const input of this.radios.querySelectorAll("input")) {
      input.disabled = !there.includes(input.value);
      input.checked = input.value === this.colour;
      input.parentElement.title = input.disabled ? colours.measure(input.value).absent : "";
    }
  }

  #policySet(policy) {
    this.policy = policy ?? {...this.rollout.own};
    const said = policy === null ? {} : policy;
    this.onState(Object.fromEntries(POLICY.map((name) => [name, said[name]])));
    this.redraw();
  }

  #judge() {
    this.now = judged(this.policy, this.rollout);
    this.#summary();
    this.chart.show(this.rollout, this.now);
    this.#colour(this.colour);
    this.#inspect();
  }

  #colour(name) {
    this.colour = name;
    const {label, low, high, unit} = colours.measure(name);
    const max = name === "weight" ? number(colours.maximum(this.rollout.weight), 2) : high;
    const ramp = Array.from({length: colours.LEVELS}, (_, i) => el("i", {class: `tok l${i}`}));
    this.legend.replaceChildren(el("span", {text: low}), el("span", {class: "ramp"}, ...ramp),
      el("span", {text: `${max} ${unit}`}),
      el("span", {class: "tok bad", text: "bad event"}));
    this.tokens.root.dataset.colour = this.legend.dataset.colour = name;
    this.legend.setAttribute("aria-label", `Colours of ${label}, from ${low} to ${max}`);
    this.tokens.paint(colours.levels(name, this.rollout, this.now), this.now.bad, this.now.cut);
  }

  #summary() {
    const {rollout, now} = this;
    const recorded = rollout.recorded;
    const overlap = now.overlaps ? now.overlaps.reduce((a, b) => a + b, 0) / rollout.T : null;
    const entries = [
      ["Tokens", count(rollout.T)],
      ["Overlap", number(overlap, 3)],
      ["Mean log-prob", `${number(rollout.meanLogprob)} nats`],
      ["Bad events", count(now.drift[rollout.T - 1])],
      ["Truncation", now.cut === null ? "none" : `after ${count(now.cut)}`],
      ["Teacher", modelName(rollout.modelId)],
    ];
    if (recorded) {
      entries.push(["In the run", `${recorded.verdict}, ended by ${recorded.finish}`]);
      if (recorded.correct !== null) entries.push(["Answer", recorded.correct ? "right" : "wrong"]);
    }
    this.stats.replaceChildren(facts(entries, "stats"));
  }

  choose(t, {quietly = false} = {}) {
    this.chosen = t;
    this.hovered = null;
    this.tokens.choose(t);
    this.tokens.reveal(t);
    this.chart.mark({chosen: t, hovered: null});
    this.#inspect();
    if (!quietly) this.onState({t: t || undefined});
  }

  #hover(t) {
    if (t === this.hovered) return;
    this.hovered = t;
    this.chart.mark({hovered: t});
    this.#inspect();
  }

  #inspect() {
    const t = this.hovered ?? this.chosen;
    this.inspector.show(this.rollout, this.now, t, this.hovered !== null && t !== this.chosen);
  }
}

/** The policy that the link names, else the rollout's own. */
function policyOf(state, rollout) {
  const policy = {...rollout.own};
  if (state.metric === "teacher_top_p_accept" && rollout.own.metric !== state.metric) {
    policy.k = rollout.maxK(state.metric);
  }
  for (const name of POLICY) if (state[name] !== undefined) policy[name] = state[name];
  if (policy.metric !== "teacher_top_p_accept" && (policy.metric !== "overlap_ratio" || !rollout.C)) {
    policy.metric = rollout.own.metric;
  }
  const share = (value, least) => Math.min(1, Math.max(least, value));
  policy.k = Math.min(rollout.maxK(policy.metric), Math.max(1, Math.round(policy.k)));
  policy.threshold = share(policy.threshold, 1e-9);
  policy.top_p = share(policy.top_p, 1e-9);
  policy.w_drop = share(policy.w_drop, 1e-9);
  return policy;
}
