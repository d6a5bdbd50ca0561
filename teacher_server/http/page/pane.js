// One half of the page: a list, a rollout or a pasted response, with the way back above it.

import * as api from "./api.js";
import {el} from "./dom.js";
import {PasteForm} from "./paste.js";
import {fromRecording} from "./rollout.js";
import {RolloutView} from "./rollout_view.js";
import {rolloutsList, runsList, stepsList} from "./runs_view.js";
import {MAX_PASTED, parse, place, placeOnly} from "./state.js";

export class Pane {
  /** `app` has href(side, state), go(side, state, {replace}), beside(side), close(side), info(). */
  constructor(side, app) {
    this.side = side;
    this.app = app;
    this.turn = 0;
    this.shown = null;
    this.path = el("nav", {class: "path", "aria-label": side === "a" ? "Place" : "Place beside"});
    this.failure = el("div", {class: "card failure", role: "alert", hidden: true});
    this.body = el("div", {class: "body"});
    this.view = new RolloutView(side, (patch) => this.#patch(patch));
    this.form = new PasteForm(side, (words) => this.#pasted(words));
    this.root = el("section", {class: "pane", tabindex: "-1",
      "aria-label": side === "a" ? "Main view" : "Beside", onclick: (event) => this.#followed(event)},
      this.path, this.failure, this.body);
  }

  /** Shows what a state says; fetches only what is not here. */
  async show(state) {
    const moved = this.shown === null || place(state) !== place(this.shown);
    const resorted = !moved && (state.sort !== this.shown.sort || state.down !== this.shown.down);
    this.shown = {...state};
    this.#showPath();
    if (!moved) {
      if (this.listed) { if (resorted) this.#list(); } else if (this.view.rollout) this.view.restate(state);
      return;
    }
    const turn = ++this.turn;
    this.listed = null;
    this.failure.hidden = true;
    this.#put(...(state.paste ? [this.form.root] : []), el("p", {class: "hint", text: "loading"}));
    this.root.setAttribute("aria-busy", "true");
    try {
      const draw = await this.#fetched(state);
      if (turn === this.turn) draw();
    } catch (error) {
      if (turn === this.turn) this.#failed(error);
    } finally {
      if (turn === this.turn) this.root.setAttribute("aria-busy", "false");
    }
  }

  /** A link of this pane changes this pane; what the other shows by now stays. */
  #followed(event) {
    const link = event.target.closest("a[href^='#']");
    if (!link || event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    this.app.go(this.side, parse(link.hash)[this.side] ?? {});
    this.root.focus({preventScroll: true});
  }

  /** Again what is shown: the token was given. */
  again() {
    const state = this.shown ?? {};
    this.shown = null;
    return this.show(state);
  }

  /** These and nothing else; what is there already keeps its focus. */
  #put(...nodes) {
    for (const child of [...this.body.children]) if (!nodes.includes(child)) child.remove();
    nodes.forEach((node, i) => {
      if (this.body.children[i] !== node) this.body.insertBefore(node, this.body.children[i] ?? null);
    });
  }

  /** An error takes the place of what was there. */
  #failed(error) {
    this.view.rollout = null;
    this.#put(...(this.shown.paste ? [this.form.root] : []));
    this.failure.replaceChildren(el("strong", {text: error.type ?? "Error"}), ` ${error.message}`);
    this.failure.hidden = false;
  }

  /** Fetches; what it returns draws. */
  async #fetched(state) {
    if (state.paste) return this.#fetchedPaste(state);
    if (state.index !== undefined) {
      const rollout = fromRecording(await api.rollout(state.run, state.step, state.index));
      return () => this.#showRollout(rollout, []);
    }
    if (state.step !== undefined) {
      const content = await api.rollouts(state.run, state.step);
      return () => { this.listed = content; this.#list(); };
    }
    if (state.run !== undefined) {
      const content = await api.steps(state.run);
      return () => this.#showSteps(content);
    }
    const content = await api.runs();
    return () => this.#put(runsList(content, (to) => this.app.href(this.side, to)));
  }

  async #fetchedPaste(state) {
    this.form.fill(state);
    this.form.limit(await this.app.info());
    if (!state.prompt && !state.response && !this.words) return () => this.#put(this.form.root);
    const words = this.words ?? state;
    this.words = null;
    const rollout = await this.form.ask({prompt: "", response: "", ...words});
    return () => this.#showRollout(rollout, [this.form.root]);
  }

  #showRollout(rollout, above) {
    if (!rollout.T) throw new Error("nothing of this response was kept: it has no tokens");
    this.#put(...above, this.view.root);
    this.view.show(rollout, this.shown);
    // A new result begins at its top; what is in sight already stays where it is.
    const top = above.length ? this.view.root : this.root;
    if (above.length || top.getBoundingClientRect().top < 0) top.scrollIntoView({block: "start"});
  }

  #pasted(words) {
    const short = words.prompt.length + words.response.length <= MAX_PASTED;
    const state = {paste: "1", ...(short ? words : {})};
    this.words = words;
    this.shown = null;
    this.app.go(this.side, state, {replace: this.view.rollout === null});
  }

  #showSteps(content) {
    const draw = () => this.#put(stepsList(content,
      (to) => this.app.href(this.side, to), async () => {
        const earlier = await api.steps(content.run, content.steps[0].step);
        content.steps = [...earlier.steps, ...content.steps];
        content.earlier = earlier.earlier;
        draw();
      }));
    draw();
  }

  #list() {
    this.#put(rolloutsList(this.listed, this.shown,
      (to) => this.app.href(this.side, to),
      (sort, down) => {
        this.#patch({sort, down: down ? "1" : undefined});
        this.#list();
        this.body.querySelector("th[aria-sort] button")?.focus();
      }));
  }

  #patch(patch) {
    this.shown = {...this.shown, ...patch};
    this.app.go(this.side, this.shown, {replace: true, quietly: true});
  }

  #showPath() {
    const {run, step, index, paste} = this.shown;
    const parts = paste ? [["Paste", null]] : [["Runs", {}]];
    if (run !== undefined) parts.push([run, {run}]);
    if (step !== undefined) parts.push([`step ${step}`, {run, step}]);
    if (index !== undefined) parts.push([`rollout ${index}`, {run, step, index}]);
    const links = parts.map(([text, to], i) => el("li", {}, i === parts.length - 1
      ? el("span", {text, "aria-current": "page"})
      : el("a", {href: this.app.href(this.side, to), text})));
    const button = (text, work) => el("button", {type: "button", class: "quiet", text, onclick: work});
    this.path.replaceChildren(el("ol", {}, ...links),
      this.side === "a" && !this.app.isSplit()
        ? button("Open beside", () => this.app.beside(placeOnly(this.shown)))
        : null ?? "",
      this.app.isSplit() ? button("Close", () => this.app.close(this.side)) : "");
  }
}
