// Elements and words that the page's parts share.

export const at = (id) => document.getElementById(id);

// Returns an element. Children that are words become text, whatever signs they have; there is no way to hand over HTML.
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const percent = (p, digits = 1) => (typeof p === "number" ? `${(100 * p).toFixed(digits)}\u00a0%` : "unknown");
export const count = (n) => Number(n).toLocaleString("en");
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
export const size = (n) => (n < 2 ** 20 ? `${Math.ceil(n / 1024)} KiB` : `${+(n / 2 ** 20).toFixed(1)} MiB`);
// Returns a 95 % interval of a part of one, in per cent.
export const interval = (pair) => (pair ? pair.map((p) => (100 * p).toFixed(1)).join(" to ") : "");

// The service's words begin small, to be read after a colon.
export function sentence(words) {
  const text = String(words).trim();
  return text && `${text[0].toUpperCase()}${text.slice(1)}${/[.!?:…]$/.test(text) ? "" : "."}`;
}

// Returns a rule of operating points in a few words, and in a few more.
export function ruleWords(rule) {
  const least = /^sensitivity_(.+)$/.exec(rule);
  if (rule === "youden") return ["Youden's index", "highest sensitivity + specificity (Youden)"];
  const part = least && percent(Number(least[1]), 0);
  return least ? [`sensitivity ${part}`, `sensitivity of at least ${part}`] : [rule, rule];
}
