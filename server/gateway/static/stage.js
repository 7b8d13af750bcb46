// The picture, its frames after each NFE, and the waterfall of its milliseconds.

import { byId, make, milliseconds } from "./dom.js";

const SLOW_FRAME_MS = 650;

let shown = null; // the entry on the stage: {settings, frames: [{src, nfe, ms}], timings, fingerprint, seen}
let slowMotion = 0; // the number of the current showing; a running slow motion of an older one stops

/** The entry that the stage shows, or null. */
export function shownEntry() {
  return shown;
}

/** Shows a finished entry, or one whose frames still arrive: then without caption and timings. */
export function showEntry(entry) {
  slowMotion += 1;
  shown = entry;
  byId("noise").hidden = entry !== null;
  byId("picture").hidden = entry === null;
  byId("film").replaceChildren(...(entry?.frames.map((frame) => filmFrame(entry, frame)) ?? []));
  if (entry) showFrame(entry, entry.frames.at(-1));
  showCaption(entry?.timings ? entry : null);
  showWaterfall(entry?.timings ? entry : null);
}

/** Plays the frames from the first to the last. */
export async function playSlowly() {
  const { frames } = shown, entry = shown, mine = ++slowMotion;
  for (const frame of frames) {
    if (mine !== slowMotion) return;
    showFrame(entry, frame);
    await new Promise((resolve) => setTimeout(resolve, SLOW_FRAME_MS));
  }
}

/** Saves the finished picture, byte for byte as the server sent it. */
export function download() {
  const { frames, settings } = shown;
  const bytes = Uint8Array.from(atob(frames.at(-1).src.split(",")[1]), (letter) => letter.charCodeAt(0));
  const href = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  make("a", { href, download: `${settings.model}-${settings.seed}-${settings.nfe}nfe.png` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

function showFrame(entry, frame) {
  const last = frame.nfe === entry.settings.nfe;
  const { prompt, nfe } = entry.settings;
  Object.assign(byId("picture"), { src: frame.src, alt: last ? prompt : `${prompt} (after NFE ${frame.nfe} of ${nfe})` });
  for (const button of byId("film").children) button.setAttribute("aria-pressed", button.dataset.nfe === String(frame.nfe));
}

function filmFrame(entry, frame) {
  const onclick = () => {
    slowMotion += 1;
    showFrame(entry, frame);
  };
  return make(
    "button",
    { type: "button", onclick, "data-nfe": frame.nfe, "aria-pressed": "false" },
    make("img", { src: frame.src, alt: "" }),
    make("span", { className: "film-nfe" }, `NFE ${frame.nfe}`),
    make("span", { className: "film-ms" }, `${milliseconds(frame.ms)} ms`),
  );
}

function showCaption(entry) {
  byId("caption").hidden = entry === null;
  if (entry === null) return;
  const { model, nfe, size, seed, prompt } = entry.settings;
  byId("caption-prompt").textContent = prompt;
  const fingerprint = make("span", { title: `Fingerprint ${entry.fingerprint}: decides the pixels` }, entry.fingerprint.slice(0, 11));
  byId("caption-facts").replaceChildren(`${model} · ${nfe} NFE · ${size} · seed ${seed} · `, fingerprint);
  byId("replay").hidden = entry.frames.length < 2;
}

function showWaterfall(entry) {
  byId("waterfall").hidden = entry === null;
  byId("timing-empty").hidden = entry !== null;
  byId("seen").textContent = entry ? `Seen from this page, network included: ${milliseconds(entry.seen)}\u00a0ms.` : "";
  if (entry === null) return;
  const { timings } = entry;
  let begun = 0;
  const rows = stagesOf(entry).map(([name, ms, kind]) => {
    const row = stageRow(name, ms, kind, begun / timings.total, ms / timings.total);
    begun += ms;
    return row;
  });
  byId("stages").replaceChildren(...rows);
  byId("total").replaceChildren(stageRow("Total", timings.total, "whole", 0, 1));
  byId("total").querySelector(".ms").append("\u00a0ms");
}

/** What the server calls queue is all that is no named stage: previews too, where they were asked for. */
function stagesOf({ frames, timings: { queue, text_encoder, steps, vae_decoder, image_encode } }) {
  return [
    [frames.length > 1 ? "Queue, previews" : "Queue", queue, "waiting"],
    ["Text encoder", text_encoder, "fixed"],
    ...steps.map((ms, index) => [`NFE ${index + 1}`, ms, "step"]),
    ["VAE decoder", vae_decoder, "fixed"],
    ["Image encode", image_encode, "fixed"],
  ];
}

function stageRow(name, ms, kind, from, share) {
  const bar = make("span", { className: `bar ${kind}` });
  bar.style.setProperty("--from", from);
  bar.style.setProperty("--share", share);
  const track = make("td", { className: "track", "aria-hidden": "true" }, bar);
  return make("tr", {}, make("th", { scope: "row" }, name), track, make("td", { className: "ms" }, milliseconds(ms)));
}
