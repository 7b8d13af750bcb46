// The same prompt and seed at every NFE, as videos that play side by side.

import { make, milliseconds, play, shape, still } from "./dom.js";

/** Where what a rung of the ladder makes will be. */
export function emptyCard(nfe) {
  return make("figure", {}, make("div", { className: "blank" }), make("figcaption", {}, `${nfe} NFE`));
}

/** The strip of a panel. */
export class Strip {
  constructor(panel) {
    this.panel = panel;
    panel.at("play-strip").addEventListener("click", () => this.play(this.players().some((player) => player.paused)));
  }

  /** An empty card for each rung. */
  begin({ prompt, seed, size }, ladder) {
    shape(this.panel.at("comparison"), size);
    this.cards = ladder.map(emptyCard);
    this.panel.at("comparison").replaceChildren(...this.cards);
    this.panel.at("compare-hint").textContent = `“${prompt}”, seed ${seed}`;
    this.panel.at("compared").hidden = false;
    this.panel.at("play-strip").hidden = true;
  }

  /** Fills the card of a rung; its button calls onclick. */
  fill(index, { video, file }, onclick) {
    const name = `${video.prompt} · ${video.num_inference_steps} NFE`;
    const { src, poster } = file;
    const moving = file.plays
      ? make("video", { src, poster, muted: true, loop: true, playsInline: true, preload: "auto" })
      : make("img", { src, alt: "" });
    const button = make("button", { type: "button", className: "thumbnail", title: name, "aria-label": name, onclick }, moving);
    const total = make("span", { className: "ms" }, `${milliseconds(video.timings.total)} ms`);
    this.cards[index].replaceChildren(button, make("figcaption", {}, `${video.num_inference_steps} NFE `, total));
  }

  /** All are there: from here they play in step. */
  finish() {
    this.panel.at("play-strip").hidden = this.players().length === 0;
    for (const player of this.players()) player.currentTime = 0;
    this.play(!still());
  }

  play(playing) {
    for (const player of this.players()) playing ? play(player) : player.pause();
    this.panel.at("play-strip").textContent = playing ? "Pause" : "Play";
  }

  players() {
    return [...this.panel.at("comparison").querySelectorAll("video")];
  }
}
