// The page: learns what is served, and opens the part that makes it.

import { closeKeyField, currentKey, startKeyField } from "./key.js";
import { pictures } from "./pictures.js";
import { listStudents } from "./server.js";
import { offerTabs, openTab, startTabs } from "./tabs.js";
import { videos } from "./videos.js";

const STARTING_MS = 1500;

let students = [];

/** Asks what is served, and again while the server is starting. */
async function loadStudents() {
  const { panel } = part();
  try {
    await learn();
  } catch (error) {
    return panel.complain(error.message, error.status);
  }
  panel.complain("");
  panel.say(students.length > 0 ? "" : "The server is starting …");
  if (students.length === 0) setTimeout(loadStudents, STARTING_MS);
}

async function learn() {
  students = await listStudents(currentKey());
  if (students.length === 0) return;
  const makers = { picture: students.filter(makes("image")), video: students.filter(makes("video")) };
  pictures.offer(makers.picture);
  videos.offer(makers.video);
  offerTabs((name) => makers[name].length > 0);
}

function makes(media) {
  return ({ media_type }) => media_type === media;
}

/** What is open now: pictures or videos. */
function part() {
  return openTab() === "video" ? videos : pictures;
}

function onKey(event) {
  const { panel } = part();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) panel.at("ask").requestSubmit();
  if (event.key === "Escape" && !closeKeyField()) panel.cancel();
}

for (const { start, panel } of [pictures, videos]) {
  start();
  panel.prepare = () => students.length > 0 || learn();
}
startKeyField(loadStudents);
startTabs((name, rest) => name === "video" && videos.open(rest));
document.addEventListener("keydown", onKey);
loadStudents();
