// Elements, made and found.

/** The element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A new element: properties are set as they are, "aria-..." and "data-..." as attributes; children are nodes or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Milliseconds for people: three digits or so. */
export function milliseconds(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** Whether as little motion as possible was asked for. */
export function still() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

/** Gives what shows videos of this size ("48x32") their shape. */
export function shape(element, size) {
  const [width, height] = size.split("x");
  element.style.setProperty("--aspect", width / height);
}

/** Plays a video. A pause that comes before it has begun is no error. */
export function play(player) {
  player.play().catch(() => {});
}

/** Brings an element into sight. */
export function reveal(element) {
  element.scrollIntoView({ block: "nearest", behavior: still() ? "auto" : "smooth" });
}

/** Saves bytes as a file. */
export function save(blob, name) {
  const href = URL.createObjectURL(blob);
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** The 8 x 8 grey latents that stand where nothing is to be seen yet. */
export function drawNoise(element) {
  const cells = Array.from({ length: 64 }, () => make("i"));
  for (const cell of cells) cell.style.setProperty("--level", Math.random().toFixed(2));
  element.replaceChildren(...cells);
}
