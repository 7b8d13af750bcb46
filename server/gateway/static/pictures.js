// The pictures of the page: asks for them, shows what comes, and keeps what this tab has seen.

import { byId, drawNoise, make, milliseconds, reveal } from "./dom.js";
import { Form } from "./form.js";
import { currentKey } from "./key.js";
import { Panel } from "./panel.js";
import { makePicture, streamPicture } from "./picture_api.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { Stage } from "./stage.js";
import { emptyCard } from "./strip.js";

const EXAMPLES = [
  "a red circle above a blue square",
  "a large yellow star on a purple background",
  "a small green triangle to the left of an orange cross",
  "a large orange disc on a blue background",
  "a blue ring in the top left on a yellow background",
];
const EXAMPLES_STUDENT = "scenes"; // who can draw them, and with which seed all of them come out well
const EXAMPLE_SEED = "7";
const KEPT_ENTRIES = 24;

const panel = new Panel("", cancel);
const stage = new Stage(panel);
const form = new Form("", ({ id }) => {
  byId("examples").hidden = id !== EXAMPLES_STUDENT;
});
const kept = []; // finished entries, newest first

/** What the page does with pictures. */
export const pictures = { panel, start, offer };

function start() {
  drawNoise(byId("noise"));
  offerExamples();
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("ask").addEventListener("input", showCode);
  byId("compare").addEventListener("click", () => byId("ask").reportValidity() && compare());
  byId("download").addEventListener("click", () => stage.download());
  byId("replay").addEventListener("click", () => stage.playSlowly());
  byId("copy-curl").addEventListener("click", () => panel.copy("curl"));
  byId("copy-python").addEventListener("click", () => panel.copy("python"));
}

/** The students that make pictures. */
function offer(students) {
  form.offer(students);
  showCode();
}

function offerExamples() {
  const ask = (prompt) => {
    byId("prompt").value = prompt;
    byId("seed").value = EXAMPLE_SEED;
    showCode();
    generate();
  };
  byId("examples").append(...EXAMPLES.map((prompt) => make("button", { type: "button", onclick: () => ask(prompt) }, prompt)));
}

function generate() {
  return panel.run(async (access) => {
    const before = stage.shown, settings = form.read(), begun = performance.now();
    const entry = { settings, frames: [] };
    const addFrame = (src, nfe) => entry.frames.push({ src, nfe, ms: performance.now() - begun });
    panel.say("Asking …");
    reveal(byId("stage"));
    const onPreview = (src, nfe) => {
      addFrame(src, nfe);
      stage.show(entry);
      panel.say(`NFE ${nfe} of ${settings.nfe}`);
    };
    try {
      const { picture, timings, fingerprint } = await streamPicture(settings, { ...access, onPreview });
      addFrame(picture, settings.nfe);
      Object.assign(entry, { timings, fingerprint, seen: performance.now() - begun });
    } catch (error) {
      if (stage.shown === entry) stage.show(before); // half a picture is none
      throw error;
    }
    stage.show(entry);
    remember(entry);
    panel.say(`Done: ${settings.nfe} NFE in ${milliseconds(entry.timings.total)} ms.`);
  });
}

/** The same prompt and seed at every NFE of the ladder, one after the other so that none waits for another. */
function compare() {
  return panel.run(async (access) => {
    const settings = form.read(), ladder = form.student.nfe;
    const cards = ladder.map(emptyCard);
    byId("comparison").replaceChildren(...cards);
    byId("compare-hint").textContent = `“${settings.prompt}”, seed ${settings.seed}`;
    byId("compared").hidden = false;
    reveal(byId("compared"));
    for (const [index, nfe] of ladder.entries()) {
      panel.say(`Comparing: ${nfe} NFE`);
      const begun = performance.now(), asked = { ...settings, nfe };
      const { picture, timings, fingerprint } = await makePicture(asked, access);
      const seen = performance.now() - begun;
      const entry = { settings: asked, frames: [{ src: picture, nfe, ms: seen }], timings, fingerprint, seen };
      const total = make("span", { className: "ms" }, `${milliseconds(timings.total)} ms`);
      cards[index].replaceChildren(thumbnail(entry), make("figcaption", {}, `${nfe} NFE `, total));
    }
    panel.say(`Compared ${ladder.join(", ")} NFE.`);
  });
}

function cancel() {
  if (panel.leave()) panel.say("Cancelled.");
}

function remember(entry) {
  kept.unshift(entry);
  kept.length = Math.min(kept.length, KEPT_ENTRIES);
  byId("past").hidden = false;
  byId("history").replaceChildren(...kept.map(thumbnail));
}

/** A button with an entry's picture that brings the entry and its settings back. */
function thumbnail(entry) {
  const { prompt, nfe, seed } = entry.settings;
  const onclick = () => {
    panel.leave();
    form.write(entry.settings);
    stage.show(entry);
    showCode();
    reveal(byId("stage"));
    panel.say("Picture and settings are back.");
  };
  const title = `${prompt} · ${nfe} NFE · seed ${seed}`;
  const image = make("img", { src: entry.frames.at(-1).src, alt: title });
  return make("button", { type: "button", className: "thumbnail", title, onclick }, image);
}

function showCode() {
  try {
    const settings = form.read(), withKey = currentKey() !== "";
    byId("curl").textContent = curlCommand(settings, location.origin, withKey);
    byId("python").textContent = pythonProgram(settings, location.origin, withKey);
  } catch {
    // an unfinished seed, or a server that starts: the last good code stays
  }
}
