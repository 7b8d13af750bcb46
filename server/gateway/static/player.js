// The video: its predictions while it is made, then the player; its facts, and the waterfall of its milliseconds.

import { drawNoise, make, milliseconds, play, shape, still } from "./dom.js";
import { currentKey } from "./key.js";
import { filmButton, fingerprintOf } from "./stage.js";
import { executedNfe, hasEnded } from "./video_api.js";
import { animations, clips, thumbnails } from "./video_files.js";
import { showWaterfall } from "./waterfall.js";

const H264 = 'video/mp4; codecs="avc1.640028"';

/** A video or, where the browser has no H.264, an animation that shows the same. */
export async function movingPicture(id, key) {
  const plays = make("video").canPlayType(H264) !== "";
  const [poster, src] = await Promise.all([thumbnails.url(id, key), (plays ? clips : animations).url(id, key)]);
  return { poster, src, plays };
}

/** The player of a panel. */
export class Player {
  constructor(panel) {
    this.panel = panel;
    this.shown = null; // {video, previews: [{src, nfe, ms, still}], file: a movingPicture once there is one, seen}
    drawNoise(panel.at("noise"));
    panel.at("player").addEventListener("error", () => this.onUnplayable());
  }

  /** Shows what there is of a video, the last of its predictions in front. null: nothing. */
  show(entry) {
    this.shown = entry;
    this.showFilm(entry);
    this.showFrame(entry?.file ? null : (entry?.previews.at(-1) ?? null));
    this.showProgress(entry?.video);
    this.showCaption(entry?.video ?? null);
    const measured = entry?.video.timings ? { ...entry.video, seen: entry.seen, previews: entry.previews.length > 0 } : null;
    showWaterfall(this.panel, measured && { ...measured, encoder: "Video encode" });
  }

  /** Gives the frame, empty or not, the shape of a video of this size. */
  shape(size) {
    shape(this.panel.at("stage"), size);
  }

  showFilm(entry) {
    const frames = entry?.previews.map((preview) =>
      filmButton(preview.nfe, preview.still, arrival(preview.ms), () => this.showFrame(preview)),
    );
    if (frames?.length && entry.file) {
      const { file, seen, video } = entry;
      frames.push(filmButton(video.num_inference_steps, file.poster, arrival(seen), () => this.showFrame(null)));
    }
    this.panel.at("film").replaceChildren(...(frames ?? []));
  }

  /** A prediction, or null for the video itself where it is finished. */
  showFrame(preview) {
    const { panel, shown } = this, file = preview === null ? shown?.file : undefined;
    const src = preview ? (still() ? preview.still : preview.src) : file && !file.plays ? file.src : null;
    panel.at("noise").hidden = Boolean(src || file);
    panel.at("picture").hidden = !src;
    if (src) Object.assign(panel.at("picture"), { src, alt: altOf(shown.video, preview?.nfe) });
    this.play(file?.plays ? file : null);
    panel.at("unplayable").hidden = !(file && !file.plays);
    const nfe = String(preview?.nfe ?? shown?.video.num_inference_steps);
    for (const button of panel.at("film").children) button.setAttribute("aria-pressed", button.dataset.nfe === nfe);
  }

  play(file) {
    const player = this.panel.at("player");
    player.hidden = file === null;
    if (file === null) return player.pause();
    if (player.src !== file.src) {
      Object.assign(player, { poster: file.poster, src: file.src, autoplay: !still() });
      player.setAttribute("aria-label", altOf(this.shown.video));
    } else if (!still()) play(player);
  }

  /** A browser may promise more than it can. */
  async onUnplayable() {
    const entry = this.shown;
    if (!entry?.file?.plays) return;
    const src = await animations.url(entry.video.id, currentKey());
    entry.file = { ...entry.file, src, plays: false };
    if (this.shown === entry) this.showFrame(null);
  }

  showProgress(video) {
    const progress = this.panel.at("progress");
    progress.hidden = !video || hasEnded(video);
    if (video) Object.assign(progress, { max: video.num_inference_steps, value: executedNfe(video) });
  }

  showCaption(video) {
    const { panel } = this;
    panel.at("caption").hidden = video === null;
    if (video === null) return;
    const { model, num_inference_steps, size, seconds, seed, prompt, fingerprint } = video;
    panel.at("caption-prompt").textContent = prompt;
    const facts = [model, `${num_inference_steps} NFE`, size, `${seconds} s`, `seed ${seed}`].join(" · ");
    panel.at("caption-facts").replaceChildren(facts, ...(fingerprint ? [" · ", fingerprintOf(video)] : []));
    panel.at("downloads").hidden = video.status !== "completed";
    this.shape(size);
  }
}

/** When a frame of the film came; of a video that was asked for elsewhere nobody knows. */
function arrival(ms) {
  return ms === undefined ? "" : `${milliseconds(ms)} ms`;
}

function altOf({ prompt, num_inference_steps }, nfe) {
  return nfe === undefined ? prompt : `${prompt} (after NFE ${nfe} of ${num_inference_steps})`;
}
