// The key field: what it holds goes to this server alone.

import { byId } from "./dom.js";

const KEPT = "fewstep.key";

/** What is typed into the field, or "". */
export function currentKey() {
  return byId("key").value.trim();
}

/** Shows the field, for an answer that asked for a key. */
export function openKeyField() {
  byId("access").open = true;
}

/** Returns whether it was open. */
export function closeKeyField() {
  const { open } = byId("access");
  byId("access").open = false;
  return open;
}

/** Brings back what this tab has kept, and calls `onUse` whenever a key is to be used. Kept for this tab only if asked to. */
export function startKeyField(onUse) {
  byId("key").value = sessionStorage.getItem(KEPT) ?? "";
  byId("keep-key").checked = byId("key").value !== "";
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (byId("keep-key").checked) sessionStorage.setItem(KEPT, currentKey());
    else sessionStorage.removeItem(KEPT);
    closeKeyField();
    onUse();
  });
}
