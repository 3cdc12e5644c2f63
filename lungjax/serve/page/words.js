// Elements and text formatting for all parts of the page.

export const at = (id) => document.getElementById(id);

// Returns an element. Strings become text nodes; HTML can't be passed.
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
// Returns an interval of a fraction in percent.
export const interval = (pair) => (pair ? pair.map((p) => (100 * p).toFixed(1)).join(" to ") : "");

// Messages of the service start with a lower-case letter, to follow a colon.
export function sentence(words) {
  const text = String(words).trim();
  return text && `${text[0].toUpperCase()}${text.slice(1)}${/[.!?:…]$/.test(text) ? "" : "."}`;
}

// Returns a short and a longer name of an operating point.
export function ruleWords(rule) {
  const least = /^sensitivity_(.+)$/.exec(rule);
  if (rule === "youden") return ["Youden's index", "highest sensitivity + specificity (Youden)"];
  const part = least && percent(Number(least[1]), 0);
  return least ? [`sensitivity ${part}`, `sensitivity of at least ${part}`] : [rule, rule];
}
