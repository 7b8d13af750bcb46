// The videos that the server knows of this key, whoever made them: they outlive this page.

import { make } from "./dom.js";
import { currentKey } from "./key.js";
import { executedNfe, hasEnded, listVideos } from "./video_api.js";
import { forgetFiles, thumbnails } from "./video_files.js";

const PAGE = 12, LONGEST_PAGE = 100;
const LOOK_MS = 2000; // between two looks at videos that are being made while nobody watches their events

/** onChoose hears the video that was clicked on; isOpen says whether anybody can see the list. */
export class VideoHistory {
  constructor(panel, { onChoose, isOpen }) {
    Object.assign(this, { panel, onChoose, isOpen });
    this.videos = []; // newest first
    this.buttons = new Map(); // id -> its button
    this.followed = null; // the id of the one whose events are heard anyway
    panel.at("more").addEventListener("click", () => this.loadMore());
  }

  find(id) {
    return this.videos.find((video) => video.id === id);
  }

  /** Asks again for as many as are shown. */
  refresh(onError = (error) => this.panel.complain(error.message, error.status)) {
    const limit = Math.min(Math.max(this.videos.length, PAGE), LONGEST_PAGE);
    return this.load({ limit }, (data) => data).catch(onError);
  }

  loadMore() {
    const known = this.videos;
    const more = this.load({ limit: PAGE, after: known.at(-1).id }, (data) => [...known, ...data]);
    return more.catch((error) => this.panel.complain(error.message, error.status));
  }

  async load(page, merge) {
    const { data, has_more } = await listVideos(page, { key: currentKey() });
    this.videos = merge(data);
    this.panel.at("more").hidden = !has_more;
    this.render();
  }

  /** A new video, or news of one. An old one that is on a page further down stays there. */
  put(video) {
    const index = this.videos.findIndex(({ id }) => id === video.id);
    if (index >= 0) this.videos[index] = video;
    else if (!(video.created_at < this.videos[0]?.created_at)) this.videos.unshift(video);
    this.render();
  }

  remove(id) {
    this.videos = this.videos.filter((video) => video.id !== id);
    forgetFiles(id);
    this.render();
  }

  render() {
    this.panel.at("past").hidden = this.videos.length === 0;
    const focused = document.activeElement?.dataset.video;
    this.panel.at("history").replaceChildren(...this.videos.map((video) => this.button(video)));
    this.buttons.get(focused)?.focus();
    clearTimeout(this.timer);
    if (this.videos.some((video) => !hasEnded(video) && video.id !== this.followed)) {
      this.timer = setTimeout(() => this.lookAgain(), LOOK_MS);
    }
  }

  /** Not while nobody sees it; and a server that is away for a while is no news. */
  lookAgain() {
    if (this.isOpen()) this.refresh(() => this.render());
    else this.render();
  }

  /** The button of a video; the same one as long as the video stands where it stood. */
  button(video) {
    const known = this.buttons.get(video.id);
    if (known?.dataset.state === stateOf(video)) return known;
    const made = this.makeButton(video);
    this.buttons.set(video.id, made);
    return made;
  }

  makeButton(video) {
    const { id, prompt, num_inference_steps, seed } = video, state = stateOf(video);
    const title = `${prompt} · ${num_inference_steps} NFE · seed ${seed}`;
    const words = make("span", { className: "state" }, state);
    const names = { title, "aria-label": `${title}: ${state}`, "data-video": id, "data-state": state };
    const onclick = () => this.onChoose(this.find(id));
    if (isKept(video)) {
      thumbnails.url(id, currentKey()).then((src) => words.replaceWith(make("img", { src, alt: "" })), () => {});
    }
    return make("button", { type: "button", className: "thumbnail", onclick, ...names }, words);
  }
}

/** Where a video stands, for people. */
export function stateOf(video) {
  if (video.status === "queued") return "Queued";
  if (video.status === "in_progress") return `NFE ${executedNfe(video)} of ${video.num_inference_steps}`;
  if (video.status === "failed") return video.error.code === "cancelled" ? "Cancelled" : "Failed";
  return isKept(video) ? "Done" : "Expired";
}

function isKept({ status, expires_at }) {
  return status === "completed" && expires_at * 1000 > Date.now();
}
