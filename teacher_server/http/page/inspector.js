// One token: its numbers, and what teacher and student would have said, side by side.

import {el, facts, number} from "./dom.js";
import {byId, oneLine} from "./units.js";

export class Inspector {
  constructor(side) {
    this.heading = el("h3", {id: `where-${side}`});
    this.word = el("p", {class: "picked"});
    this.facts = el("div");
    this.lists = el("div", {class: "lists"});
    this.root = el("aside", {class: "inspector", "aria-labelledby": `where-${side}`},
      this.heading, this.word, this.facts, this.lists);
  }

  /** Token t of a rollout under what drift.js made of it; `passing` for one that is only hovered. */
  show(rollout, now, t, passing) {
    this.root.classList.toggle("passing", passing);
    this.heading.textContent = `Token ${t + 1} of ${rollout.T}`
      + (passing ? " (under the mouse)" : "");
    this.word.textContent = shown(rollout, rollout.ids[t]);
    this.facts.replaceChildren(facts(numbers(rollout, now, t)));
    this.lists.replaceChildren(teacherTable(rollout, t), studentTable(rollout, t));
  }
}

const shown = (rollout, id) => oneLine(rollout.text(id) || byId(id));

function numbers(rollout, now, t) {
  const value = (column, digits = 3) => column === null ? null : number(column[t], digits);
  const entries = [
    ["id", rollout.ids[t]],
    ["teacher log-prob", value(rollout.logprobs)],
    ["student log-prob", value(rollout.behavior)],
    ["overlap", value(now.overlaps, 2)],
    ["KL", value(rollout.kl)],
    ["rank", rollout.ranks?.[t] ?? null],
    ["entropy", value(rollout.entropies)],
    ["weight", value(rollout.weight)],
    ["R", value(now.reliability)],
    ["drift", now.drift[t]],
    ["bad event", now.bad[t] ? "yes" : rollout.mask && !rollout.mask[t] ? "not counted" : "no"],
  ];
  return entries.filter(([, said]) => said !== null);
}

function table(caption, columns, rows) {
  return el("table", {},
    el("caption", {text: caption}),
    el("thead", {}, el("tr", {}, ...columns.map((text, i) =>
      el("th", {scope: "col", class: i ? "num" : "text", text})))),
    el("tbody", {}, ...rows));
}

/** A row: text, probability with its bar, and more numbers. */
function row(rollout, id, sampled, common, probability, ...more) {
  const bar = el("span", {class: "bar"});
  bar.style.setProperty("--p", String(Math.min(1, probability || 0)));
  const said = el("td", {class: "num"}, number(probability), " ", bar);
  const name = (id === sampled ? "sampled " : "") + (common ? "common" : "");
  return el("tr", {class: name},
    el("td", {class: "text", text: shown(rollout, id), title: `id ${id}`}), said,
    ...more.map((text) => el("td", {class: "num", text})));
}

function teacherTable(rollout, t) {
  const {K, C} = rollout;
  const student = new Set(C ? rollout.studentIds.subarray(t * C, (t + 1) * C) : []);
  const rows = [];
  for (let j = 0; j < K; j++) {
    const id = rollout.topkIds[t * K + j];
    const p = Math.exp(rollout.topkLogprobs[t * K + j]);
    rows.push(row(rollout, id, rollout.ids[t], student.has(id), p));
  }
  return table("Teacher's top-K", ["token", "p"], rows);
}

function studentTable(rollout, t) {
  const {K, C} = rollout;
  if (!C) {
    return el("p", {class: "hint", text: "The student's top-K is not known here: recorded rollouts "
      + "have it, and a pasted response has it where candidate ids are sent with it."});
  }
  const teacher = new Set(rollout.topkIds.subarray(t * K, (t + 1) * K));
  const own = rollout.studentLogprobs !== null;
  const rows = [];
  for (let j = 0; j < C; j++) {
    const id = rollout.studentIds[t * C + j];
    const at = rollout.atStudent ? Math.exp(rollout.atStudent[t * C + j]) : NaN;
    const p = own ? Math.exp(rollout.studentLogprobs[t * C + j]) : at;
    rows.push(row(rollout, id, rollout.ids[t], teacher.has(id), p, ...(own ? [number(at)] : [])));
  }
  const caption = own ? "Student's top-K" : "Candidates";
  return table(caption, own ? ["token", "p", "teacher's p"] : ["token", "teacher's p"], rows);
}
