// Tabs, as the ARIA practices have them: arrow keys choose, and the address says which one is open.

import { byId } from "./dom.js";

const tabs = [...document.querySelectorAll("#tabs [role=tab]")];
let opened = () => {};

/** The name of the open tab. */
export function openTab() {
  return nameOf(tabs.find((tab) => tab.ariaSelected === "true"));
}

/** The address of a part of this page, without a new step in the browser's history. */
export function setAddress(name) {
  history.replaceState(null, "", `#${name}`);
}

/** onOpen hears (name, the rest of the address behind it) whenever a tab is opened. */
export function startTabs(onOpen) {
  opened = onOpen;
  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  byId("tabs").addEventListener("keydown", onKey);
  addEventListener("hashchange", openAddressed);
}

/** offers: by name, whether there is something behind a tab. With less than two there is nothing to choose from. */
export function offerTabs(offers) {
  const offered = tabs.filter((tab) => offers(nameOf(tab)));
  byId("tabs").hidden = offered.length < 2;
  for (const tab of tabs) {
    if (offered.length < 2) panelOf(tab).removeAttribute("role");
    else panelOf(tab).setAttribute("role", "tabpanel");
  }
  if (offered.length < 2) open(offered[0], "");
  else openAddressed();
}

/** Other addresses are places on the page, as the prompt to skip to. */
function openAddressed() {
  const [name, rest = ""] = location.hash.slice(1).split("/");
  const tab = tabs.find((each) => nameOf(each) === name);
  if (tab && !byId("tabs").hidden) open(tab, rest);
}

function choose(tab) {
  setAddress(nameOf(tab));
  open(tab, "");
}

function open(tab, rest) {
  for (const each of tabs) {
    each.ariaSelected = String(each === tab);
    each.tabIndex = each === tab ? 0 : -1;
    panelOf(each).hidden = each !== tab;
  }
  byId("skip").href = `#${panelOf(tab).querySelector("textarea").id}`;
  opened(nameOf(tab), rest);
}

function onKey(event) {
  const here = tabs.indexOf(event.target);
  const there = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: -1 }[event.key];
  if (here < 0 || there === undefined) return;
  event.preventDefault();
  const tab = tabs.at(there % tabs.length);
  tab.focus();
  choose(tab);
}

function nameOf(tab) {
  return tab.id.replace("-tab", "");
}

function panelOf(tab) {
  return byId(tab.getAttribute("aria-controls"));
}
