// The page: whose teacher it is, one or two panes, and the link that says what they show.

import * as api from "./api.js";
import {count, modelName} from "./dom.js";
import {Pane} from "./pane.js";
import {format, parse} from "./state.js";

const RESTS_MS = 200;
const byId = (id) => document.getElementById(id);

class App {
  constructor() {
    this.state = parse(location.hash);
    this.panes = {a: new Pane("a", this), b: null};
    this.told = null;
    byId("panes").append(this.panes.a.root);
    byId("paste").addEventListener("click", () => this.go("a", {paste: "1"}));
    byId("runs").addEventListener("click", () => this.go("a", {}));
    byId("access").addEventListener("change", () => this.#tokenGiven());
    byId("token-form").addEventListener("submit", (event) => event.preventDefault());
    api.whenUnauthenticated(() => { byId("token-form").hidden = false; });
    for (const moved of ["popstate", "hashchange"]) addEventListener(moved, () => this.#linkChanged());
  }

  async start() {
    this.describe().catch((error) => { byId("served").textContent = error.message; });
    if (!Object.keys(this.state.a).length) await this.#firstPlace();
    this.show();
  }

  #linkChanged() {
    clearTimeout(this.resting);
    this.state = parse(location.hash);
    this.show();
  }

  /** Without runs to show, the page begins with the form. */
  async #firstPlace() {
    const there = await this.info().then((info) => info.shows_runs, () => true);
    if (!there) this.#write({a: {paste: "1"}, b: null}, true);
  }

  info() {
    this.told ??= api.info().catch((error) => { this.told = null; throw error; });
    return this.told;
  }

  async describe() {
    const info = await this.info();
    const name = modelName(info.model_id);
    document.title = `${name} \u00b7 driftline teacher`;
    byId("served").textContent = `${name} \u00b7 ${info.engine} ${info.engine_version} \u00b7 ${
      info.dtype} \u00b7 ${count(info.vocab_size)} ids \u00b7 context ${count(info.max_context)}`;
  }

  isSplit() { return this.state.b !== null; }

  href(side, to) { return format({...this.state, [side]: to}); }

  /** Another state of a pane: a new entry of the history, or this one. */
  go(side, to, {replace = false, quietly = false} = {}) {
    if (!quietly) {
      this.#write({...this.state, [side]: to}, replace);
      this.show();
      return;
    }
    // A slider that is dragged changes the link once it rests: browsers refuse hundreds of changes.
    this.state = {...this.state, [side]: to};
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.#write(this.state, true), RESTS_MS);
  }

  beside(state) {
    this.#write({a: this.state.a, b: state}, false);
    this.show();
  }

  close(side) {
    const left = side === "a" ? this.state.b : this.state.a;
    this.panes.b = null;
    this.#write({a: left ?? {}, b: null}, false);
    this.show();
  }

  #write(state, replace) {
    clearTimeout(this.resting);
    this.state = state;
    const link = format(state);
    if (link === location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", link);
  }

  /** The panes that the state asks for, in its order. */
  #layOut() {
    if (this.isSplit()) this.panes.b ??= new Pane("b", this);
    const roots = [this.panes.a.root, ...(this.isSplit() ? [this.panes.b.root] : [])];
    const box = byId("panes");
    if (box.children.length !== roots.length || roots.some((root, i) => box.children[i] !== root)) {
      box.replaceChildren(...roots);
    }
    box.classList.toggle("split", this.isSplit());
  }

  show() {
    this.#layOut();
    byId("paste").setAttribute("aria-pressed", String(Boolean(this.state.a.paste)));
    byId("runs").setAttribute("aria-pressed", String(!this.state.a.paste));
    this.panes.a.show(this.state.a);
    if (this.isSplit()) this.panes.b.show(this.state.b);
  }

  #tokenGiven() {
    api.setToken(byId("access").value);
    this.told = null;
    this.describe().then(() => { byId("token-form").hidden = true; }, () => {});
    this.panes.a.again();
    if (this.isSplit()) this.panes.b.again();
  }
}

export const app = new App();
app.start();
