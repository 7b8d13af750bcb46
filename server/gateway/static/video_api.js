// Videos as the server makes them: jobs that go on whether this page is there or not.

import { ApiError, asJson, ask, askJson, readEvents } from "./server.js";

const VIDEOS = "/v1/videos";
const TRIES = 3; // of taking a job in
const FIRST_WAIT_MS = 500, LONGEST_WAIT_MS = 8000; // before a lost connection is made again

/** Whether nothing more will happen to a video. */
export function hasEnded({ status }) {
  return status === "completed" || status === "failed";
}

/** How many of its NFEs are executed; `progress` is their share in whole percent, never more. */
export function executedNfe({ progress, num_inference_steps }) {
  return Math.ceil((progress * num_inference_steps) / 100);
}

/** What was asked for, as a form has it. */
export function settingsOf({ prompt, model, size, num_inference_steps, seed }) {
  return { prompt, model, size, nfe: num_inference_steps, seed };
}

/** A new job. A connection that fails is tried again with the same Idempotency-Key, so that it is one job however it fails. */
export async function createVideo(settings, { key, signal, previews = 0 }) {
  const options = asJson({ ...settings, partial_images: previews });
  options.headers["Idempotency-Key"] = randomName();
  for (let tries = 1; ; tries += 1) {
    try {
      return await askJson(VIDEOS, { key, signal, ...options });
    } catch (error) {
      if (tries === TRIES || !(error instanceof ApiError) || error.status !== undefined) throw error;
    }
    await pause(FIRST_WAIT_MS, signal);
  }
}

/**
 * Follows a video to its end, over as many connections as that takes. Each begins with the present state, so nothing is missed
 * but previews. onState hears the video, onPreview (data URL of an animated WebP, the NFE it follows), onLost why a connection
 * ended. Returns the video as it ended, or null when it was deleted.
 */
export async function watchVideo(id, { key, signal, onState, onPreview, onLost }) {
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    let lost = "The connection was lost.";
    try {
      const answer = await ask(`${VIDEOS}/${id}/events`, { key, signal });
      for await (const event of readEvents(answer.body)) {
        if (event.error) throw new ApiError(event.error.message);
        if (event.type === "video.deleted") return null;
        if (event.type === "video.partial_image") await onPreview(`data:image/webp;base64,${event.b64_json}`, event.step);
        else onState(event.video);
        if (event.video && hasEnded(event.video)) return event.video;
        wait = FIRST_WAIT_MS;
      }
    } catch (error) {
      if (!(error instanceof ApiError) || (error.status < 500 && error.status !== 429)) throw error;
      lost = error.message;
    }
    onLost(lost);
    await pause(wait, signal);
  }
}

/** A video as it is now. */
export function getVideo(id, access) {
  return askJson(`${VIDEOS}/${id}`, access);
}

/** {data: videos, the newest first, has_more}; after: the id of the last one that is known. */
export function listVideos({ after, limit }, access) {
  return askJson(`${VIDEOS}?${new URLSearchParams({ limit, ...(after && { after }) })}`, access);
}

/** Stops a video; one that has ended stays as it is. Returns it. */
export function cancelVideo(id, access) {
  return askJson(`${VIDEOS}/${id}/cancel`, { ...access, method: "POST" });
}

/** Forgets a video and its files. */
export function deleteVideo(id, access) {
  return askJson(`${VIDEOS}/${id}`, { ...access, method: "DELETE" });
}

/** A file of a finished video; which: "variant=thumbnail" or "format=mp4", webp or gif. */
export async function videoFile(id, which, access) {
  return (await ask(`${VIDEOS}/${id}/content?${which}`, access)).blob();
}

/** crypto.randomUUID is missing where a page came over plain http from another machine. */
function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
