// The picture, its frames after each NFE, and the waterfall of its milliseconds.

import { byId, make, milliseconds, save } from "./dom.js";
import { showWaterfall } from "./waterfall.js";

const SLOW_FRAME_MS = 650;

/** The picture of a panel. */
export class Stage {
  constructor(panel) {
    this.panel = panel;
    this.shown = null; // {settings, frames: [{src, nfe, ms}], timings, fingerprint, seen}
    this.slowMotion = 0; // the number of the current showing; a running slow motion of an older one stops
  }

  /** Shows a finished entry, or one whose frames still arrive: then without caption and timings. null: nothing. */
  show(entry) {
    this.slowMotion += 1;
    this.shown = entry;
    const finished = entry?.timings ? entry : null;
    byId("noise").hidden = entry !== null;
    byId("picture").hidden = entry === null;
    byId("film").replaceChildren(...(entry?.frames.map((frame) => this.filmFrame(entry, frame)) ?? []));
    if (entry) showFrame(entry, entry.frames.at(-1));
    showCaption(finished);
    showWaterfall(this.panel, finished && { ...finished, previews: finished.frames.length > 1, encoder: "Image encode" });
  }

  /** Plays the frames from the first to the last. */
  async playSlowly() {
    const entry = this.shown, mine = ++this.slowMotion;
    for (const frame of entry.frames) {
      if (mine !== this.slowMotion) return;
      showFrame(entry, frame);
      await new Promise((resolve) => setTimeout(resolve, SLOW_FRAME_MS));
    }
  }

  /** Saves the finished picture, byte for byte as the server sent it. */
  download() {
    const { frames, settings } = this.shown;
    const bytes = Uint8Array.from(atob(frames.at(-1).src.split(",")[1]), (letter) => letter.charCodeAt(0));
    save(new Blob([bytes], { type: "image/png" }), `${settings.model}-${settings.seed}-${settings.nfe}nfe.png`);
  }

  filmFrame(entry, frame) {
    const onclick = () => {
      this.slowMotion += 1;
      showFrame(entry, frame);
    };
    return filmButton(frame.nfe, frame.src, `${milliseconds(frame.ms)} ms`, onclick);
  }
}

/** A frame of the film: a button with a small picture, the NFE it follows and a few more words. */
export function filmButton(nfe, src, more, onclick) {
  return make(
    "button",
    { type: "button", onclick, "data-nfe": nfe, "aria-pressed": "false" },
    make("img", { src, alt: "" }),
    make("span", { className: "film-nfe" }, `NFE ${nfe}`),
    make("span", { className: "film-ms" }, more),
  );
}

function showFrame(entry, frame) {
  const last = frame.nfe === entry.settings.nfe;
  const { prompt, nfe } = entry.settings;
  Object.assign(byId("picture"), { src: frame.src, alt: last ? prompt : `${prompt} (after NFE ${frame.nfe} of ${nfe})` });
  for (const button of byId("film").children) button.setAttribute("aria-pressed", button.dataset.nfe === String(frame.nfe));
}

function showCaption(entry) {
  byId("caption").hidden = entry === null;
  if (entry === null) return;
  const { model, nfe, size, seed, prompt } = entry.settings;
  byId("caption-prompt").textContent = prompt;
  byId("caption-facts").replaceChildren(`${model} · ${nfe} NFE · ${size} · seed ${seed} · `, fingerprintOf(entry));
  byId("replay").hidden = entry.frames.length < 2;
}

/** The beginning of a fingerprint, the whole of it on hover. */
export function fingerprintOf({ fingerprint }) {
  return make("span", { title: `Fingerprint ${fingerprint}: decides the pixels` }, fingerprint.slice(0, 11));
}
