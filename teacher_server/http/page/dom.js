// Nodes without markup: text is only ever set as text, so a token that looks like HTML stays a token.

/** A node: `text`, `class`, `on...` listeners, `data` for data-*, all else attributes. */
export function el(name, props = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") node.textContent = value;
    else if (key === "class") node.className = value;
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number for people: a dash for what is missing, a true minus. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  return value.toFixed(digits).replace("-", "\u2212");
}

export const count = (value) => (value ?? null) === null ? "\u2013" : value.toLocaleString("en");

/** Terms and values side by side. */
export function facts(entries, className = "facts") {
  return el("dl", {class: className}, ...entries.map(([term, value]) =>
    el("div", {}, el("dt", {text: term}), el("dd", {text: value}))));
}

/** A function that runs once a frame, with the arguments of its last call. */
export function onceAFrame(work) {
  let asked = 0;
  let last = [];
  return (...args) => {
    last = args;
    asked ||= requestAnimationFrame(() => { asked = 0; work(...last); });
  };
}

/** A listener for a mouse that moves: one that rests says nothing, whatever moves below it. */
export function whenMoved(work) {
  let last = "";
  return (event) => {
    const at = `${event.clientX},${event.clientY}`;
    if (event.pointerType === "touch" || at === last) return;
    last = at;
    work(event);
  };
}

/** A model's name; of a path on the server only what it ends with. */
export function modelName(id) {
  if (!id) return "a teacher without a name";
  return /^(\/|\.{1,2}\/|[A-Za-z]:\\)/.test(id) ? id.split(/[\\/]/).filter(Boolean).pop() : id;
}
