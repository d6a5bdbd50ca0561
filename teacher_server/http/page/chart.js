// Overlap, reliability and cumulative drift over position, drawn with d3 (page/d3.js).
//
// A response is longer than the chart is wide: each measure is drawn as the mean and the range of as
// many tokens as fall on a few pixels. What is marked (token, cut) is at its own position.

import {maximum} from "./colours.js";
import {el, number, onceAFrame, whenMoved} from "./dom.js";

const d3 = globalThis.d3;
const HEIGHT = 210;
const MARGIN = {top: 10, right: 46, bottom: 34, left: 42};
const BIN_PX = 3;

export class Chart {
  constructor({onChoose, onHover}) {
    this.svg = d3.create("svg").attr("class", "chart").attr("role", "img");
    this.readout = el("p", {class: "readout", "aria-hidden": "true"});
    this.root = el("figure", {class: "plot"}, this.#legend(), this.svg.node(), this.readout);
    this.marks = {chosen: 0, hovered: null};
    const node = this.svg.node();
    node.addEventListener("click", (event) => { const t = this.#at(event); if (t !== null) onChoose(t); });
    node.addEventListener("pointermove", whenMoved((event) => onHover(this.#at(event))));
    node.addEventListener("pointerleave", () => onHover(null));
    new ResizeObserver(onceAFrame(() => this.#resized())).observe(this.root);
  }

  #legend() {
    this.shareName = el("span", {text: "overlap"});
    const entry = (name, ...text) => el("span", {class: `key ${name}`}, el("i"), ...text);
    return el("figcaption", {},
      entry("share", this.shareName), entry("r", "reliability R"),
      entry("drift", "cumulative drift (right)"), entry("cut", "truncation"));
  }

  /** `now` is drift.js's; without overlap the teacher's probability of the token takes its place. */
  show(rollout, now) {
    this.rollout = rollout;
    this.now = now;
    this.share = now.overlaps ?? Float32Array.from(rollout.logprobs, Math.exp);
    this.shareName.textContent = now.overlaps ? "overlap" : "teacher's p of the token";
    this.#draw();
  }

  mark(marks) {
    Object.assign(this.marks, marks);
    this.#mark();
  }

  #resized() {
    const width = this.#room();
    if (!this.rollout || width === this.width) return;
    this.width = width;
    this.#draw();
  }

  #room() { return Math.round(this.svg.node().getBoundingClientRect().width); }

  #at(event) {
    if (!this.rollout) return null;
    const [x] = d3.clientPoint(this.svg.node(), event);
    const t = Math.floor(this.x.invert(x));
    return t >= 0 && t < this.rollout.T ? t : null;
  }

  #draw() {
    this.width ||= this.#room();
    if (this.width < 80) return;
    const {T} = this.rollout;
    const right = this.width - MARGIN.right;
    const bottom = HEIGHT - MARGIN.bottom;
    this.x = d3.scaleLinear().domain([0, T]).range([MARGIN.left, right]);
    this.y = d3.scaleLinear().domain([0, 1]).range([bottom, MARGIN.top]);
    const most = Math.max(1, this.now.drift[T - 1] ?? 0);
    this.z = d3.scaleLinear().domain([0, most]).range([bottom, MARGIN.top]).nice(4);
    const bins = this.#bins(Math.max(1, Math.floor((right - MARGIN.left) / BIN_PX)));
    this.svg.attr("viewBox", `0 0 ${this.width} ${HEIGHT}`).attr("aria-label", this.#summary());
    this.svg.selectAll("*").remove();
    this.#axes(bottom, right, most);
    const at = (bin) => this.x((bin.start + bin.end) / 2);
    this.#path("share band", d3.area().x(at).y0((b) => this.y(b.low)).y1((b) => this.y(b.high))(bins));
    this.#path("share line", d3.line().x(at).y((b) => this.y(b.mean))(bins));
    // Up to the end of a bin there is what it ends with.
    const steps = [{end: 0, drift: 0, r: 1}, ...bins];
    const stepped = () => d3.line().x((b) => this.x(b.end)).curve(d3.curveStepBefore);
    this.#path("drift line", stepped().y((b) => this.z(b.drift))(steps));
    this.#path("r line", stepped().y((b) => this.y(b.r))(steps));
    if (this.now.cut !== null) this.#upright("cut", this.now.cut);
    this.#mark();
  }

  #bins(most) {
    const {T} = this.rollout;
    const num = Math.min(T, most);
    const bins = [];
    for (let b = 0; b < num; b++) {
      const start = Math.floor((b * T) / num);
      const end = Math.floor(((b + 1) * T) / num);
      let low = Infinity, high = -Infinity, sum = 0, counted = 0;
      for (let t = start; t < end; t++) {
        const v = this.share[t];
        if (Number.isNaN(v)) continue;
        low = Math.min(low, v); high = Math.max(high, v); sum += v; counted += 1;
      }
      if (!counted) low = high = sum = 0;
      const last = end - 1;
      bins.push({
        start, end, low, high, mean: counted ? sum / counted : 0,
        drift: this.now.drift[last], r: this.now.reliability[last],
      });
    }
    return bins;
  }

  #axes(bottom, right, most) {
    const axis = (name, made, x, y) => this.svg.append("g").attr("class", `axis ${name}`)
      .attr("transform", `translate(${x},${y})`).call(made);
    const ticks = Math.max(2, Math.floor(this.width / 110));
    axis("x", d3.axisBottom(this.x).ticks(ticks).tickSizeOuter(0), 0, bottom);
    axis("y", d3.axisLeft(this.y).ticks(4), MARGIN.left, 0);
    axis("z", d3.axisRight(this.z).ticks(Math.min(4, most)).tickFormat(d3.format("d")), right, 0);
    this.svg.append("text").attr("class", "title").attr("text-anchor", "middle")
      .attr("x", (MARGIN.left + right) / 2).attr("y", HEIGHT - 3).text("position (tokens)");
  }

  #path(name, d) { this.svg.append("path").attr("class", name).attr("d", d); }

  #upright(name, position) {
    const x = this.x(position);
    this.svg.append("line").attr("class", `upright ${name}`)
      .attr("x1", x).attr("x2", x).attr("y1", MARGIN.top).attr("y2", HEIGHT - MARGIN.bottom);
  }

  #mark() {
    if (!this.x) return;
    this.svg.selectAll(".upright.chosen, .upright.hovered").remove();
    const {chosen, hovered} = this.marks;
    this.#upright("chosen", chosen + 0.5);
    if (hovered !== null && hovered !== chosen) this.#upright("hovered", hovered + 0.5);
    this.readout.textContent = this.#said(hovered ?? chosen);
  }

  #said(t) {
    const name = this.now.overlaps ? "overlap" : "p";
    return `token ${t + 1}: ${name} ${number(this.share[t], 2)}, R ${
      number(this.now.reliability[t], 3)}, drift ${this.now.drift[t]}`;
  }

  #summary() {
    const {T} = this.rollout;
    const cut = this.now.cut === null ? "not truncated" : `truncated after token ${this.now.cut}`;
    return `${this.shareName.textContent}, reliability and cumulative drift over ${T} tokens: ${
      maximum(this.now.drift)} bad events, ${cut}`;
  }

  /** The chart as a PNG, with its colours as they are. */
  async png() {
    const node = this.svg.node();
    const copy = node.cloneNode(true);
    const styled = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray",
      "stroke-opacity", "font-family", "font-size", "opacity"];
    const originals = node.querySelectorAll("*");
    copy.querySelectorAll("*").forEach((element, i) => {
      const style = getComputedStyle(originals[i]);
      for (const name of styled) element.setAttribute(name, style.getPropertyValue(name));
    });
    copy.setAttribute("width", this.width);
    copy.setAttribute("height", HEIGHT);
    const text = new XMLSerializer().serializeToString(copy);
    const url = URL.createObjectURL(new Blob([text], {type: "image/svg+xml"}));
    try {
      const image = new Image();
      image.src = url;
      await image.decode();
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * this.width, 2 * HEIGHT];
      const context = canvas.getContext("2d");
      context.fillStyle = getComputedStyle(document.body).backgroundColor;
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      return await new Promise((done) => canvas.toBlob(done, "image/png"));
    } finally {
      URL.revokeObjectURL(url);
    }
  }
}
