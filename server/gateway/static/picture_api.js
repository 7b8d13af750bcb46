// Pictures as the server makes them: as a stream, or at once.

import { ApiError, asJson, ask, askJson, readEvents } from "./server.js";

const GENERATIONS = "/v1/images/generations";

/**
 * One picture with its previews. settings: {prompt, model, size, nfe, seed}, seed in decimal digits;
 * onPreview hears (data URL of a PNG, the NFE it follows). Returns {picture: data URL, timings, fingerprint}.
 */
export async function streamPicture(settings, { key, signal, onPreview }) {
  const answer = await ask(GENERATIONS, { key, signal, ...asJson({ ...settings, stream: true, partial_images: 3 }) });
  for await (const event of readEvents(answer.body)) {
    if (event.error) throw new ApiError(event.error.message, answer.status);
    if (event.type === "image_generation.partial_image") onPreview(png(event.b64_json), event.step);
    if (event.type === "image_generation.completed") return finished(event.b64_json, event);
  }
  throw new ApiError("The server ended its answer before the picture was complete. Try again.", answer.status);
}

/** One picture without previews; the same result as streamPicture. */
export async function makePicture(settings, { key, signal }) {
  const answer = await askJson(GENERATIONS, { key, signal, ...asJson(settings) });
  return finished(answer.data[0].b64_json, answer);
}

function finished(b64, { timings, fingerprint }) {
  return { picture: png(b64), timings, fingerprint };
}

function png(b64) {
  return `data:image/png;base64,${b64}`;
}
