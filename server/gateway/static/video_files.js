// Files of videos as addresses of this page. They are fetched with the key, which the src of an element could not send.

import { videoFile } from "./video_api.js";

/** which: see videoFile; most: how many are kept, those that were asked for last. */
class Files {
  constructor(which, most) {
    Object.assign(this, { which, most, urls: new Map() }); // id -> promise of an address, the last one asked for at the end
  }

  /** The address of the file of a video. */
  url(id, key) {
    const url = this.urls.get(id) ?? videoFile(id, this.which, { key }).then((blob) => URL.createObjectURL(blob));
    this.urls.delete(id);
    this.urls.set(id, url);
    url.catch(() => this.urls.delete(id));
    if (this.urls.size > this.most) this.forget(this.urls.keys().next().value);
    return url;
  }

  forget(id) {
    this.urls.get(id)?.then(URL.revokeObjectURL, () => {});
    this.urls.delete(id);
  }
}

export const clips = new Files("format=mp4", 12); // more than a strip and the player show at once
export const animations = new Files("format=webp", 12);
export const thumbnails = new Files("variant=thumbnail", 400);

/** To be called when a video was deleted. */
export function forgetFiles(id) {
  for (const files of [clips, animations, thumbnails]) files.forget(id);
}
