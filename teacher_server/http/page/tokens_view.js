// The tokens of a response as coloured text. Only the lines in sight are nodes: each line has one
// height, tokens are measured once, and what is out of sight is a number of pixels.

import {MISSING} from "./colours.js";
import {el, onceAFrame, whenMoved} from "./dom.js";
import {visible} from "./units.js";

const ROW_PX = 30;
const SPARE_ROWS = 8;
const GAP_PX = 2; // of a token's margins and padding
const PART_PX = 9; // least width of a token in a character of several

export class TokensView {
  /** `onChoose(t)` for click, tap and keys; `onHover(t or null)` for a mouse that moves. */
  constructor(label, {onChoose, onHover}) {
    this.id = `tokens-${Math.random().toString(36).slice(2, 8)}`;
    this.lines = el("div", {class: "lines", role: "presentation"});
    this.root = el("div", {
      class: "tokens", role: "listbox", tabindex: "0", "aria-label": label,
      onclick: (event) => { const t = tokenOf(event); if (t !== null) onChoose(t); },
      onkeydown: (event) => this.#key(event, onChoose),
      onpointermove: whenMoved((event) => onHover(tokenOf(event))),
      onpointerleave: () => onHover(null),
    }, this.lines);
    Object.assign(this, {rollout: null, rows: null, nodes: null, levels: null, chosen: 0});
    this.measure = document.createElement("canvas").getContext("2d");
    this.widths = new Map();
    this.root.addEventListener("scroll", onceAFrame(() => this.#draw(false)), {passive: true});
    this.watch = new ResizeObserver(onceAFrame(() => this.#resized()));
    this.watch.observe(this.root);
  }

  /** Shows a response from its first token on. */
  show(rollout, chosen) {
    Object.assign(this, {rollout, chosen, rows: null, nodes: null, levels: null});
    this.lines.replaceChildren();
    this.unitOf = new Int32Array(rollout.T);
    rollout.units.forEach((unit, u) => this.unitOf.fill(u, unit.first, unit.first + unit.num));
    this.widths.clear();
    this.width = 0;
    this.root.scrollTop = 0;
    this.#resized();
    if (chosen > 0) this.reveal(chosen);
  }

  /** What the tokens look like: levels [T], bad [T], and where the response is cut. */
  paint(levels, bad, cut) {
    Object.assign(this, {levels, bad, cut});
    this.#repaint();
  }

  choose(t) {
    this.chosen = t;
    this.#repaint();
  }

  /** Scrolls until a token is in sight, and no further. */
  reveal(t) {
    if (!this.rows) return;
    const top = this.#rowOf(t) * ROW_PX;
    const view = this.root;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + ROW_PX > view.scrollTop + view.clientHeight) {
      view.scrollTop = top + ROW_PX - view.clientHeight;
    }
    this.#draw(false);
  }

  #rowOf(t) {
    const u = this.unitOf[t];
    let low = 0;
    let high = this.rows.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.rows[middle] <= u) low = middle; else high = middle - 1;
    }
    return low;
  }

  #resized() {
    if (this.rollout === null || this.root.clientWidth === 0) return;
    if (this.root.clientWidth === this.width) return;
    this.width = this.root.clientWidth;
    this.rows = this.#broken(this.width - 20);
    this.lines.style.height = `${this.rows.length * ROW_PX}px`;
    this.#draw(true);
  }

  /** First unit of each line. */
  #broken(room) {
    this.measure.font = getComputedStyle(this.root).font;
    const rows = [0];
    let x = 0;
    this.rollout.units.forEach((unit, u) => {
      const width = Math.min(this.#widthOf(unit), room);
      const ended = u > 0 && this.rollout.units[u - 1].text.endsWith("\n");
      if (u > 0 && (x + width > room || ended)) { rows.push(u); x = 0; }
      x += width;
    });
    return rows;
  }

  #widthOf(unit) {
    let width = this.widths.get(unit.text);
    if (width === undefined) {
      width = this.measure.measureText(visible(unit.text)).width + GAP_PX;
      this.widths.set(unit.text, width);
    }
    return unit.num === 1 ? width : Math.max(width, unit.num * PART_PX + GAP_PX);
  }

  /** Makes the nodes of the lines in sight, unless they are there. */
  #draw(anew) {
    if (!this.rows) return;
    const first = Math.max(0, Math.floor(this.root.scrollTop / ROW_PX) - SPARE_ROWS);
    const seen = Math.ceil((this.root.clientHeight || 400) / ROW_PX) + 2 * SPARE_ROWS;
    const end = Math.min(this.rows.length, first + seen);
    if (!anew && this.drawn?.first === first && this.drawn.end === end) return;
    this.drawn = {first, end};
    this.nodes = new Map();
    const lines = [];
    for (let row = first; row < end; row++) lines.push(this.#line(row));
    this.lines.replaceChildren(...lines);
    this.#repaint();
  }

  #line(row) {
    const units = this.rollout.units;
    const line = el("div", {class: "line", role: "presentation"});
    line.style.top = `${row * ROW_PX}px`;
    const end = row + 1 < this.rows.length ? this.rows[row + 1] : units.length;
    for (let u = this.rows[row]; u < end; u++) line.append(this.#unit(units[u]));
    return line;
  }

  #unit(unit) {
    const shown = visible(unit.text);
    if (unit.num === 1) return this.#token(unit.first, shown, null);
    const box = el("span", {class: "unit", role: "presentation"});
    box.style.minWidth = `${unit.num * PART_PX}px`;
    for (let i = 0; i < unit.num; i++) {
      const label = `${shown}, part ${i + 1} of ${unit.num}`;
      box.append(this.#token(unit.first + i, "", label));
    }
    box.append(el("span", {class: "glyph", "aria-hidden": "true", text: shown}));
    return box;
  }

  #token(t, text, label) {
    const node = el("span", {
      role: "option", id: `${this.id}-${t}`, "data-t": t, text,
      "aria-label": label ?? (text.trim() ? null : `token ${t + 1}, spaces`),
      "aria-posinset": t + 1, "aria-setsize": this.rollout.T,
    });
    this.nodes.set(t, node);
    return node;
  }

  #repaint() {
    if (!this.nodes || !this.levels) return;
    // Only what is there can be the active one.
    if (this.nodes.has(this.chosen)) {
      this.root.setAttribute("aria-activedescendant", `${this.id}-${this.chosen}`);
    } else this.root.removeAttribute("aria-activedescendant");
    for (const [t, node] of this.nodes) {
      const level = this.levels[t];
      const name = (level === MISSING ? "tok none" : `tok l${level}`)
        + (this.bad[t] ? " bad" : "") + (this.cut !== null && t >= this.cut ? " after" : "")
        + (this.cut !== null && t === this.cut - 1 ? " last" : "")
        + (t === this.chosen ? " chosen" : "");
      if (node.className !== name) node.className = name;
      const selected = String(t === this.chosen);
      if (node.getAttribute("aria-selected") !== selected) {
        node.setAttribute("aria-selected", selected);
      }
    }
  }

  #key(event, onChoose) {
    if (this.rollout === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const t = this.chosen;
    const last = this.rollout.T - 1;
    const page = Math.max(1, Math.floor(this.root.clientHeight / ROW_PX) - 1);
    const to = {
      ArrowRight: () => t + 1, ArrowLeft: () => t - 1,
      ArrowDown: () => this.#lineOff(1), ArrowUp: () => this.#lineOff(-1),
      PageDown: () => this.#lineOff(page), PageUp: () => this.#lineOff(-page),
      Home: () => 0, End: () => last,
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    onChoose(Math.min(last, Math.max(0, to)));
  }

  /** The token about as far along the line so many lines off. */
  #lineOff(by) {
    const row = this.#rowOf(this.chosen);
    const target = row + by;
    if (target < 0) return 0;
    if (target >= this.rows.length) return this.rollout.T - 1;
    const along = this.unitOf[this.chosen] - this.rows[row];
    const end = target + 1 < this.rows.length ? this.rows[target + 1] : this.rollout.units.length;
    return this.rollout.units[Math.min(this.rows[target] + along, end - 1)].first;
  }
}

/** The token that an event is about; null beside all. */
function tokenOf(event) {
  const t = event.target.closest("[data-t]")?.dataset.t;
  return t === undefined ? null : Number(t);
}
