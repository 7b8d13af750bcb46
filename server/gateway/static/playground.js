// The page: reads the form, asks the server, shows what comes.

import { listStudents, makePicture, streamPicture } from "./api.js";
import { byId, make, milliseconds, scrolling } from "./dom.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { download, playSlowly, showEntry, shownEntry } from "./stage.js";

const EXAMPLES = [
  "a red circle above a blue square",
  "a large yellow star on a purple background",
  "a small green triangle to the left of an orange cross",
  "a large orange disc on a blue background",
  "a blue ring in the top left on a yellow background",
];
const EXAMPLES_STUDENT = "scenes"; // who can draw them, and with which seed all of them come out well
const EXAMPLE_SEED = "7";
const LARGEST_SEED = 2n ** 64n - 1n;
const KEPT_ENTRIES = 24;
const KEY_NAME = "fewstep.key";
const STARTING_MS = 1500;

let students = [];
let running = null; // the AbortController of what is under way
const kept = []; // finished entries, newest first

// ---- the form ----

/** What the form asks for. An empty seed is drawn here and now. Throws an Error in words. */
function readSettings() {
  if (!student()) throw new Error("The server has not said yet what it serves. Try again in a moment.");
  const typed = byId("seed").value.trim();
  if (!/^\d*$/.test(typed) || BigInt(typed) > LARGEST_SEED) {
    throw new Error(`The seed must be a whole number from 0 to ${LARGEST_SEED}, not “${typed}”.`);
  }
  const seed = typed === "" ? rollSeed() : String(BigInt(typed));
  return { prompt: byId("prompt").value, model: student().id, size: byId("size").value, nfe: chosenNfe(), seed };
}

function writeSettings({ prompt, model, size, nfe, seed }) {
  byId("prompt").value = prompt;
  byId("seed").value = seed;
  byId("student").value = model;
  offerStudent(nfe);
  byId("size").value = size;
}

function student() {
  return students.find(({ id }) => id === byId("student").value);
}

function chosenNfe() {
  return Number(document.querySelector("input[name=nfe]:checked")?.value);
}

/** Fills sizes and the NFE ladder with what the chosen student can do; `nfe` is chosen if it is a rung. */
function offerStudent(nfe = chosenNfe()) {
  const { id, sizes, nfe: ladder, default_nfe } = student();
  byId("size").replaceChildren(...sizes.map((size) => make("option", { value: size }, size.replace("x", " × "))));
  const chosen = ladder.includes(nfe) ? nfe : default_nfe;
  byId("ladder").replaceChildren(...ladder.map((rung) => ladderRung(rung, rung === chosen)));
  byId("compare").textContent = `Compare ${ladder.join(", ")} NFE`;
  byId("examples").hidden = id !== EXAMPLES_STUDENT;
}

function ladderRung(nfe, checked) {
  const marks = Array.from({ length: Math.min(nfe, 8) }, () => make("i"));
  return make(
    "label",
    {},
    make("input", { type: "radio", name: "nfe", value: nfe, checked }),
    make("span", { className: "rung" }, `${nfe}`, make("span", { className: "marks", "aria-hidden": "true" }, ...marks)),
  );
}

function rollSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

// ---- asking ----

/** Runs `work` as the only thing under way, and says how it ended. */
async function run(work) {
  running?.abort();
  const mine = (running = new AbortController());
  setBusy(true);
  complain("");
  try {
    if (students.length === 0) await loadStudents();
    if (students.length > 0) await work({ key: byId("key").value.trim(), signal: mine.signal });
  } catch (error) {
    if (running !== mine) return;
    say(mine.signal.aborted ? "Cancelled." : "");
    if (!mine.signal.aborted) complain(error.message, error.status);
  } finally {
    if (running === mine) {
      running = null;
      setBusy(false);
    }
  }
}

function generate() {
  return run(async (access) => {
    const before = shownEntry(), settings = readSettings(), begun = performance.now();
    const entry = { settings, frames: [] };
    const addFrame = (src, nfe) => entry.frames.push({ src, nfe, ms: performance.now() - begun });
    say("Asking …");
    revealStage();
    const onPreview = (src, nfe) => {
      addFrame(src, nfe);
      showEntry(entry);
      say(`NFE ${nfe} of ${settings.nfe}`);
    };
    try {
      const { picture, timings, fingerprint } = await streamPicture(settings, { ...access, onPreview });
      addFrame(picture, settings.nfe);
      Object.assign(entry, { timings, fingerprint, seen: performance.now() - begun });
    } catch (error) {
      if (shownEntry() === entry) showEntry(before); // half a picture is none
      throw error;
    }
    showEntry(entry);
    remember(entry);
    say(`Done: ${settings.nfe} NFE in ${milliseconds(entry.timings.total)} ms.`);
  });
}

/** The same prompt and seed at every NFE of the ladder, one after the other so that none waits for another. */
function compare() {
  return run(async (access) => {
    const settings = readSettings(), ladder = student().nfe;
    const cards = ladder.map((nfe) => make("figure", {}, make("div", { className: "blank" }), make("figcaption", {}, `${nfe} NFE`)));
    byId("comparison").replaceChildren(...cards);
    byId("compare-hint").textContent = `“${settings.prompt}”, seed ${settings.seed}`;
    byId("compared").hidden = false;
    byId("compared").scrollIntoView({ block: "nearest", behavior: scrolling() });
    for (const [index, nfe] of ladder.entries()) {
      say(`Comparing: ${nfe} NFE`);
      const begun = performance.now(), asked = { ...settings, nfe };
      const { picture, timings, fingerprint } = await makePicture(asked, access);
      const seen = performance.now() - begun;
      const entry = { settings: asked, frames: [{ src: picture, nfe, ms: seen }], timings, fingerprint, seen };
      const total = make("span", { className: "ms" }, `${milliseconds(timings.total)} ms`);
      cards[index].replaceChildren(thumbnail(entry), make("figcaption", {}, `${nfe} NFE `, total));
    }
    say(`Compared ${ladder.join(", ")} NFE.`);
  });
}

/** Asks what is served, and again while the server is starting. */
async function loadStudents() {
  try {
    students = await listStudents(byId("key").value.trim());
  } catch (error) {
    return complain(error.message, error.status);
  }
  if (students.length === 0) {
    say("The server is starting …");
    setTimeout(loadStudents, STARTING_MS);
    return;
  }
  say("");
  complain("");
  byId("student").replaceChildren(...students.map(({ id }) => make("option", { value: id }, id)));
  offerStudent();
  showCode();
}

// ---- showing ----

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
    running?.abort();
    writeSettings(entry.settings);
    showEntry(entry);
    showCode();
    revealStage();
    say("Picture and settings are back.");
  };
  const title = `${prompt} · ${nfe} NFE · seed ${seed}`;
  return make("button", { type: "button", className: "thumbnail", title, onclick }, make("img", { src: entry.frames.at(-1).src, alt: title }));
}

function showCode() {
  try {
    const settings = readSettings(), withKey = byId("key").value.trim() !== "";
    byId("curl").textContent = curlCommand(settings, location.origin, withKey);
    byId("python").textContent = pythonProgram(settings, location.origin, withKey);
  } catch {
    // an unfinished seed, or a server that starts: the last good code stays
  }
}

/** Copies an element's text; where the browser forbids that (plain http), selects it for Ctrl+C. */
async function copy(id) {
  try {
    await navigator.clipboard.writeText(byId(id).textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren(byId(id));
    say("Selected; press Ctrl+C to copy.");
  }
}

function setBusy(busy) {
  byId("stage").classList.toggle("busy", busy);
  byId("stage").setAttribute("aria-busy", busy);
  if (!busy && document.activeElement === byId("cancel")) byId("generate").focus();
  byId("cancel").disabled = !busy;
}

function revealStage() {
  byId("stage").scrollIntoView({ block: "nearest", behavior: scrolling() });
}

function say(text) {
  byId("status").textContent = text;
}

function complain(text, status) {
  byId("problem").textContent = text;
  byId("problem").hidden = text === "";
  if (status === 401 || status === 403) byId("access").open = true;
}

// ---- wiring ----

function listen() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("ask").addEventListener("input", showCode);
  byId("student").addEventListener("change", () => offerStudent());
  byId("compare").addEventListener("click", () => byId("ask").reportValidity() && compare());
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("dice").addEventListener("click", () => {
    byId("seed").value = rollSeed();
    showCode();
  });
  byId("download").addEventListener("click", download);
  byId("replay").addEventListener("click", playSlowly);
  byId("copy-curl").addEventListener("click", () => copy("curl"));
  byId("copy-python").addEventListener("click", () => copy("python"));
  byId("key-form").addEventListener("submit", useKey);
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  if (event.key !== "Escape") return;
  running?.abort();
  byId("access").open = false;
}

/** Kept for this tab only if asked to. */
function useKey(event) {
  event.preventDefault();
  if (byId("keep-key").checked) sessionStorage.setItem(KEY_NAME, byId("key").value.trim());
  else sessionStorage.removeItem(KEY_NAME);
  byId("access").open = false;
  loadStudents();
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

/** The 8 x 8 grey latents that stand where no picture is yet. */
function drawNoise() {
  const cells = Array.from({ length: 64 }, () => make("i"));
  for (const cell of cells) cell.style.setProperty("--level", Math.random().toFixed(2));
  byId("noise").replaceChildren(...cells);
}

byId("key").value = sessionStorage.getItem(KEY_NAME) ?? "";
byId("keep-key").checked = byId("key").value !== "";
drawNoise();
offerExamples();
listen();
loadStudents();
