// Lists: the runs, the steps of a run, the rollouts of a step. Every row is a link.

import {count, el, number} from "./dom.js";

const MANY = 200; // rows drawn at first

const when = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB",
  {dateStyle: "medium", timeStyle: "short"});
const size = (bytes) => bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

function listing(caption, columns, rows) {
  const body = el("tbody", {}, ...rows.slice(0, MANY));
  const table = el("table", {class: "listing"},
    el("caption", {text: caption}), el("thead", {}, el("tr", {}, ...columns)), body);
  const box = el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption}, table);
  if (rows.length > MANY) {
    const more = el("button", {type: "button", class: "quiet", text: `show all ${rows.length}`,
      onclick: () => { body.replaceChildren(...rows); more.remove(); }});
    box.append(more);
  }
  return box;
}

const head = (text, isNumber) => el("th", {scope: "col", class: isNumber ? "num" : "text", text});
const num = (text) => el("td", {class: "num", text});
const linked = (href, text) => el("td", {class: "text"}, el("a", {href, text}));
const problems = (list) => list.length === 0 ? null
  : el("ul", {class: "warnings"}, ...list.map((text) => el("li", {text})));

/** GET /v1/runs; `href(place)` is the link of a place. */
export function runsList({runs, left_out}, href) {
  if (!runs.length) return el("p", {class: "hint", text: "No run in the folder has recorded rollouts yet."});
  const rows = runs.map((run) => el("tr", {}, linked(href({run: run.run}), run.run),
    num(count(run.num_steps)), num(`${run.first_step} \u2013 ${run.last_step}`),
    el("td", {class: "text", text: when(run.updated_at)})));
  const columns = [head("run"), head("recorded steps", true), head("from \u2013 to", true), head("written")];
  return el("div", {}, listing("Runs", columns, rows),
    left_out ? el("p", {class: "hint", text: `${left_out} older runs are not listed.`}) : null);
}

/** GET /v1/runs/RUN */
export function stepsList({run, steps, earlier, origin}, href, showEarlier) {
  const rows = [...steps].reverse().map((step) => el("tr", {},
    linked(href({run, step: step.step}), `step ${step.step}`), num(count(step.num_rollouts)),
    num(number(step.mean_overlap, 3)), num(count(step.num_tokens)), num(count(step.num_truncated)),
    num(step.num_correct === null ? "\u2013" : `${step.num_correct}`), num(size(step.num_bytes)),
    el("td", {class: "text", text: step.problems.length ? "incomplete" : ""})));
  const columns = [head("step"), head("rollouts", true), head("overlap", true), head("tokens", true),
    head("truncated", true), head("right", true), head("size", true), head("")];
  const told = steps.flatMap((step) => step.problems);
  return el("div", {}, origin ? originOf(origin) : null, problems(told),
    listing(`Steps of ${run}`, columns, rows),
    earlier ? el("button", {type: "button", class: "quiet", text: `${earlier} earlier steps`,
      onclick: showEarlier}) : null);
}

function originOf(origin) {
  const policy = Object.entries(origin.drift_policy ?? {}).map(([name, value]) => `${name} ${value}`);
  const teachers = Object.values(origin.teachers ?? {}).join(", ");
  const said = [["student", origin.student], ["teacher", teachers], ["policy", policy.join(", ")],
    ["commit", origin.commit?.slice(0, 10)]].filter(([, value]) => value);
  return el("p", {class: "hint", text: said.map((pair) => pair.join(": ")).join(" \u00b7 ")});
}

const COLUMNS = [
  ["index", "rollout", (r) => r.index],
  ["mean_overlap", "overlap", (r) => r.mean_overlap, 3],
  ["num_tokens", "length", (r) => r.num_tokens],
  ["verdict", "verdict", (r) => `${r.verdict}, ${r.finish}`],
  ["mean_teacher_logprob", "teacher log-prob", (r) => r.mean_teacher_logprob, 3],
  ["mean_reverse_kl", "KL", (r) => r.mean_reverse_kl, 3],
  ["num_bad_events", "bad events", (r) => r.num_bad_events],
  ["correct", "right", (r) => r.correct === null ? null : r.correct ? "yes" : "no"],
  ["response", "response", (r) => r.response],
];
const TEXTS = new Set(["verdict", "correct", "response"]);

/** GET /v1/runs/RUN/steps/STEP, sorted; `sortBy(name, down)` when a heading is pressed. */
export function rolloutsList({run, step, rollouts, left_out, problems: told}, state, href, sortBy) {
  const sort = COLUMNS.some(([name]) => name === state.sort) ? state.sort : "mean_overlap";
  const down = Boolean(state.down);
  const value = COLUMNS.find(([name]) => name === sort)[2];
  const order = [...rollouts].sort((a, b) => compared(value(a), value(b), down) || a.index - b.index);
  const rows = order.map((rollout) => el("tr", {}, ...COLUMNS.map(([name, , of, digits]) => {
    if (name === "index") return linked(href({run, step, index: rollout.index}), `rollout ${rollout.index}`);
    const said = of(rollout);
    if (name === "response") return el("td", {class: "text excerpt", text: said});
    const text = typeof said === "number" ? (digits ? number(said, digits) : count(said)) : said ?? "\u2013";
    return el("td", {class: TEXTS.has(name) ? "text" : "num", text});
  })));
  const columns = COLUMNS.map(([name, label]) => el("th",
    {scope: "col", class: TEXTS.has(name) || name === "index" ? "text" : "num",
      "aria-sort": name === sort ? (down ? "descending" : "ascending") : null},
    el("button", {type: "button", class: "sort", text: label,
      onclick: () => sortBy(name, name === sort ? !down : false)})));
  return el("div", {}, problems(told), listing(`Rollouts of step ${step} of ${run}`, columns, rows),
    left_out ? el("p", {class: "hint", text: `${left_out} more rollouts are in the file.`}) : null);
}

/** What is missing comes last, whichever way. */
function compared(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = a < b ? -1 : a > b ? 1 : 0;
  return down ? -order : order;
}
