// Elements from values. Text goes in as text nodes only: names and answers are strangers' words, and the page's
// policy makes any attempt to parse them as markup an error.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** Return a new element with attributes and children; null and false children are left out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Return a new SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== false));
  return node;
}

/** Set a node's text if it is another one, so that nothing is drawn, or read aloud, for nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Tell people who listen to the page, and not look at it. */
export function say(text) {
  setText($("said"), text);
}
