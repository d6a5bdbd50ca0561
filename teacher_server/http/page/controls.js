// The drift policy as sliders: what another one would have made of the same lists.

import {el} from "./dom.js";

const METRICS = {
  overlap_ratio: "overlap is low",
  teacher_top_p_accept: "outside the nucleus",
};
const DECAY_STEP = 0.01; // of log10

export class Controls {
  /** `onChange(policy)` while a slider moves. */
  constructor(name, onChange) {
    this.onChange = onChange;
    this.metric = el("select", {id: `${name}-metric`, onchange: () => this.#metricChosen()},
      ...Object.entries(METRICS).map(([value, text]) => el("option", {value, text})));
    this.sliders = {
      threshold: this.#slider(name, "threshold", "threshold", 0.01, 1, 0.01),
      top_p: this.#slider(name, "top_p", "nucleus p", 0.01, 1, 0.01),
      k: this.#slider(name, "k", "k", 1, 1, 1),
      w_drop: this.#slider(name, "w_drop", "decay: R lost a bad event", -4, 0, DECAY_STEP),
    };
    this.reset = el("button", {type: "button", class: "quiet", onclick: () => this.#toOwn()});
    this.root = el("fieldset", {class: "controls"}, el("legend", {text: "Drift policy"}),
      el("label", {for: `${name}-metric`, class: "slider"}, "bad event where", this.metric),
      ...Object.values(this.sliders).map((slider) => slider.root), this.reset);
  }

  #slider(name, key, text, min, max, step) {
    const id = `${name}-${key}`;
    const output = el("output", {for: id});
    const input = el("input", {type: "range", id, min, max, step, oninput: () => {
      const value = Number(input.value);
      this.policy = {...this.policy, [key]: key === "w_drop" ? rounded(10 ** value) : value};
      this.#told();
    }});
    const root = el("label", {for: id, class: "slider"},
      el("span", {}, `${text} `, output), input);
    return {root, input, output};
  }

  /** Sets out from a policy of rollout.js, whose own is `rollout.own`. */
  show(rollout, policy) {
    this.rollout = rollout;
    this.policy = policy;
    const overlap = this.metric.querySelector("[value=overlap_ratio]");
    overlap.disabled = rollout.C === 0;
    overlap.textContent = METRICS.overlap_ratio
      + (rollout.C === 0 ? " (needs the student's top-K)" : "");
    this.#place();
  }

  #metricChosen() {
    const metric = this.metric.value;
    const k = metric === this.rollout.own.metric ? this.rollout.own.k : this.rollout.maxK(metric);
    this.policy = {...this.policy, metric, k};
    this.#place();
    this.onChange(this.policy);
  }

  #toOwn() {
    this.policy = {...this.rollout.own};
    this.#place();
    this.onChange(null);
  }

  #place() {
    const {policy, sliders, rollout} = this;
    this.metric.value = policy.metric;
    sliders.k.input.max = rollout.maxK(policy.metric);
    sliders.k.input.value = policy.k;
    sliders.threshold.input.value = policy.threshold;
    sliders.top_p.input.value = policy.top_p;
    sliders.w_drop.input.value = Math.log10(policy.w_drop);
    sliders.threshold.root.hidden = policy.metric !== "overlap_ratio";
    sliders.top_p.root.hidden = policy.metric !== "teacher_top_p_accept";
    this.#write();
  }

  #told() {
    this.#write();
    this.onChange(this.policy);
  }

  #write() {
    const {policy, sliders} = this;
    for (const [name, slider] of Object.entries(sliders)) {
      slider.output.textContent = String(rounded(policy[name]));
    }
    sliders.w_drop.input.setAttribute("aria-valuetext", String(rounded(policy.w_drop)));
    const own = Object.entries(this.rollout.own).every(([name, value]) => policy[name] === value);
    this.reset.disabled = own;
    const whose = this.rollout.recorded?.policy ? "the run's own" : "the usual policy";
    this.reset.textContent = own ? `this is ${whose}` : `back to ${whose}`;
  }
}

const rounded = (value) => Number(value.toPrecision(3));
