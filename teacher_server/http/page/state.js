// What the link says: one or two panes, each with what it shows and how. A link reopens the view.

const NUMBERS = new Set([
  "step", "index", "temperature", "topk", "t", "k", "threshold", "top_p", "w_drop",
]);
const NAMES = [
  "run", "step", "index", "paste", "prompt", "response", "ids", "temperature", "topk", "colour", "t",
  "metric", "k", "threshold", "top_p", "w_drop", "sort", "down",
];
const PASTED = ["prompt", "response", "ids", "temperature", "topk"];
const SIDES = ["a", "b"];
export const MAX_PASTED = 6000; // characters of a pasted text that a link still carries

/** {a, b}: the state of each pane; b is null for one pane. */
export function parse(hash) {
  const params = new URLSearchParams(hash.replace(/^#/, ""));
  const state = {a: {}, b: null};
  for (const side of SIDES) {
    for (const name of NAMES) {
      const value = params.get(`${side}.${name}`);
      if (value === null) continue;
      const parsed = NUMBERS.has(name) ? Number(value) : value;
      if (NUMBERS.has(name) && !Number.isFinite(parsed)) continue;
      state[side] ??= {};
      state[side][name] = parsed;
    }
  }
  if (params.has("b") && state.b === null) state.b = {};
  return state;
}

export function format(state) {
  const params = new URLSearchParams();
  for (const side of SIDES) {
    const pane = state[side];
    if (pane === null) continue;
    let said = false;
    for (const name of NAMES) {
      const value = pane[name];
      if (value === undefined || value === null || value === "") continue;
      params.set(`${side}.${name}`, String(value));
      said = true;
    }
    if (side === "b" && !said) params.set("b", "");
  }
  return `#${params}`;
}

/** What decides the data of a pane; the rest is how it is shown. */
export const place = (pane) => JSON.stringify([
  pane.run ?? null, pane.step ?? null, pane.index ?? null,
  pane.paste ? PASTED.map((name) => pane[name] ?? "") : null,
]);

/** The same place, shown in the usual way. */
export function placeOnly(pane) {
  return Object.fromEntries(["run", "step", "index", "paste", ...PASTED]
    .map((name) => [name, pane[name]]).filter(([, value]) => value !== undefined));
}
