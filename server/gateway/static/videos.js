// The videos of the page: has them made, follows them, shows them, and finds them again.

import { make, milliseconds, reveal, save } from "./dom.js";
import { Form } from "./form.js";
import { currentKey } from "./key.js";
import { Panel } from "./panel.js";
import { movingPicture, Player } from "./player.js";
import { videoCurlCommand, videoPythonProgram } from "./snippets.js";
import { Strip } from "./strip.js";
import { openTab, setAddress } from "./tabs.js";
import { cancelVideo, createVideo, deleteVideo, getVideo, hasEnded, settingsOf, videoFile, watchVideo } from "./video_api.js";
import { stateOf, VideoHistory } from "./video_history.js";

const PREVIEWS = 3;
const VIDEO_ID = /^video_[0-9a-f]+$/;

const panel = new Panel("video-", cancel);
const form = new Form("video-", ({ frames, fps, default_size }) => {
  if (!player.shown) player.shape(default_size);
  panel.at("length").textContent = `${frames} frames at ${fps} per second: ${Number((frames / fps).toFixed(3))} s.`;
});
const player = new Player(panel);
const strip = new Strip(panel);
const history = new VideoHistory(panel, { onChoose: choose, isOpen: () => openTab() === "video" && !document.hidden });
let followed = null; // the id of the video under way, which Cancel stops
let stopping = false; // Cancel was pressed since the work began

/** What the page does with videos. */
export const videos = { panel, start, offer, open };

function start() {
  const ask = panel.at("ask");
  ask.addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  ask.addEventListener("input", showCode);
  panel.at("compare").addEventListener("click", () => ask.reportValidity() && compare());
  panel.at("delete").addEventListener("click", deleteShown);
  for (const format of ["mp4", "webp", "gif"]) panel.at(`download-${format}`).addEventListener("click", () => download(format));
  panel.at("copy-curl").addEventListener("click", () => panel.copy("curl"));
  panel.at("copy-python").addEventListener("click", () => panel.copy("python"));
}

/** The students that make videos. */
function offer(students) {
  form.offer(students);
  showCode();
}

/** The tab was opened, perhaps by the address of a video. */
function open(id) {
  history.refresh();
  if (VIDEO_ID.test(id) && id !== player.shown?.video.id) bringBack(() => getVideo(id, { key: currentKey() }));
}

// ---- asking ----

/** Work on jobs: unlike pictures they go on when the page turns to something else. */
function run(work) {
  stopping = false;
  return panel.run(async (access) => {
    setFollowed(null);
    try {
      await work(access);
    } finally {
      if (!access.signal.aborted) setFollowed(null);
    }
  });
}

function generate() {
  return run(async (access) => {
    const settings = form.read(), begun = performance.now();
    panel.say("Asking …");
    reveal(panel.at("stage"));
    const video = await createVideo(settings, { ...access, previews: PREVIEWS });
    const entry = { video, previews: [] };
    if (!(await follow(entry, access, begun))) return;
    panel.say(`Done: ${settings.nfe} NFE in ${milliseconds(entry.video.timings.total)} ms.`);
  });
}

/** The same prompt and seed at every NFE of the ladder, one after the other so that none waits for another. */
function compare() {
  return run(async (access) => {
    const settings = form.read(), ladder = form.student.nfe;
    strip.begin(settings, ladder);
    reveal(panel.at("compared"));
    for (const [index, nfe] of ladder.entries()) {
      if (stopping) return panel.say("Cancelled.");
      panel.say(`Comparing: ${nfe} NFE`);
      const entry = { video: await createVideo({ ...settings, nfe }, access), previews: [] };
      if (stopping) await cancelVideo(entry.video.id, access);
      if (!(await finish(entry, access, () => {}))) return;
      strip.fill(index, entry, () => choose(entry.video));
    }
    strip.finish();
    panel.say(`Compared ${ladder.join(", ")} NFE.`);
  });
}

/** A video of the history, with its settings. */
function choose(video) {
  reveal(panel.at("stage"));
  bringBack(async () => video);
}

function bringBack(find) {
  return run(async (access) => {
    const video = await find();
    form.write(settingsOf(video));
    showCode();
    if (await follow({ video, previews: [] }, access)) panel.say("Video and settings are back.");
  });
}

/** Shows a video until it has ended, and returns whether it is there. begun: performance.now() when it was asked for. */
async function follow(entry, access, begun) {
  setAddress(`video/${entry.video.id}`);
  const show = () => player.show(entry);
  show();
  const onPreview = async (src, nfe) => {
    const ms = begun === undefined ? undefined : performance.now() - begun;
    const preview = { src, nfe, ms, still: await firstFrame(src) };
    access.signal.throwIfAborted();
    entry.previews = [...entry.previews.filter((earlier) => earlier.nfe < nfe), preview];
    show();
  };
  const made = await finish(entry, access, show, onPreview);
  if (entry.video === null) return player.show(null);
  if (made && begun !== undefined) entry.seen = performance.now() - begun;
  show();
  return made;
}

/** Waits until a video has ended, and says how. Returns whether it can be shown: then it has a file. */
async function finish(entry, access, onChange, onPreview = () => {}) {
  const { id } = entry.video;
  const onState = (video) => {
    entry.video = video;
    history.put(video);
    panel.say(`${stateOf(video)}.`);
    onChange();
  };
  if (!hasEnded(entry.video)) {
    setFollowed(id);
    onState(entry.video);
    const onLost = (why) => panel.say(`${why} Connecting again …`);
    if ((await watchVideo(id, { ...access, onState, onPreview, onLost })) === null) return gone(entry);
  }
  const { status, error } = entry.video;
  if (status === "completed") entry.file = await movingPicture(id, access.key);
  access.signal.throwIfAborted();
  if (status === "failed" && error.code === "cancelled") panel.say("Cancelled.");
  else if (status === "failed") panel.complain(error.message);
  return status === "completed";
}

function gone(entry) {
  history.remove(entry.video.id);
  entry.video = null;
  panel.say("The video was deleted.");
  return false;
}

async function cancel() {
  if (followed === null) return;
  stopping = true;
  await attempt(() => cancelVideo(followed, { key: currentKey() }));
}

async function deleteShown() {
  const { id } = player.shown.video;
  if (followed === id && panel.leave()) setFollowed(null);
  await attempt(async () => {
    await deleteVideo(id, { key: currentKey() });
    history.remove(id);
    player.show(null);
    setAddress("video");
    panel.say("Deleted.");
    panel.at("generate").focus();
  });
}

async function download(format) {
  const { id, model, seed, num_inference_steps } = player.shown.video;
  const name = `${model}-${seed}-${num_inference_steps}nfe.${format}`;
  await attempt(async () => save(await videoFile(id, `format=${format}`, { key: currentKey() }), name));
}

/** Something beside what is under way. */
async function attempt(work) {
  panel.complain("");
  try {
    await work();
  } catch (error) {
    panel.complain(error.message, error.status);
  }
}

// ---- showing ----

function setFollowed(id) {
  followed = history.followed = id;
  panel.at("cancel").disabled = id === null;
}

function showCode() {
  try {
    const settings = form.read(), withKey = currentKey() !== "";
    panel.at("curl").textContent = videoCurlCommand(settings, location.origin, withKey);
    panel.at("python").textContent = videoPythonProgram(settings, location.origin, withKey);
  } catch {
    // an unfinished seed, or a server that starts: the last good code stays
  }
}

/** The first frame of an animation, which stands still. */
async function firstFrame(src) {
  const image = make("img", { src });
  await image.decode();
  const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}
