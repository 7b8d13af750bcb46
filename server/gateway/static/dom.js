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

/** How to scroll: at once for readers who asked for as little motion as possible. */
export function scrolling() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
}
