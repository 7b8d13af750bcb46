// A part of the page that does one thing at a time and says, where one looks, how it is going.

import { byId } from "./dom.js";
import { currentKey, openKeyField } from "./key.js";

/** prefix: of the ids of its elements; cancel: what its button and the Escape key do; prepare: what goes before all work. */
export class Panel {
  constructor(prefix, cancel) {
    this.prefix = prefix;
    this.cancel = cancel;
    this.prepare = () => {};
    this.running = null; // the AbortController of what is under way
    this.at("cancel").addEventListener("click", cancel);
  }

  at(id) {
    return byId(this.prefix + id);
  }

  /** Runs `work` as the only thing under way; it is given {key, signal}. What it throws is shown. */
  async run(work) {
    this.leave();
    const mine = (this.running = new AbortController());
    this.setBusy(true);
    this.complain("");
    try {
      await this.prepare();
      await work({ key: currentKey(), signal: mine.signal });
    } catch (error) {
      if (this.running !== mine) return;
      this.say("");
      this.complain(error.message, error.status);
    } finally {
      if (this.running === mine) {
        this.running = null;
        this.setBusy(false);
      }
    }
  }

  /** Ends what is under way on this page. Returns whether there was something. */
  leave() {
    const left = this.running;
    this.running = null;
    left?.abort();
    if (left) this.setBusy(false);
    return left !== null;
  }

  setBusy(busy) {
    this.at("stage").classList.toggle("busy", busy);
    this.at("stage").setAttribute("aria-busy", busy);
    if (!busy && document.activeElement === this.at("cancel")) this.at("generate").focus();
    this.at("cancel").disabled = !busy;
  }

  say(text) {
    this.at("status").textContent = text;
  }

  complain(text, status) {
    this.at("problem").textContent = text;
    this.at("problem").hidden = text === "";
    if (status === 401 || status === 403) openKeyField();
  }

  /** Copies an element's text; where the browser forbids that (plain http), selects it for Ctrl+C. */
  async copy(id) {
    try {
      await navigator.clipboard.writeText(this.at(id).textContent);
      this.say("Copied.");
    } catch {
      getSelection().selectAllChildren(this.at(id));
      this.say("Selected; press Ctrl+C to copy.");
    }
  }
}
