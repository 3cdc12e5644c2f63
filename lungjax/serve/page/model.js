// The model: its training data, its input, and its scores on test images.
import { limit } from "./service.js";
import { at, count, interval, make, percent, plural, ruleWords, size } from "./words.js";

const SCORES = {
  accuracy: "Accuracy",
  balanced_accuracy: "Balanced accuracy",
  auc_macro: "AUC, mean of classes",
  ece: "Calibration error",
};
const SPLITS = ["train", "val", "test"];
const LEVELS = { slice: "image", patient: "patient" };
const MAX_OPEN = 4; // warnings that are shown unfolded

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const small = (words) => make("small", {}, words);
const quiet = (words) => make("p", { className: "quiet" }, words);

// Rows are lists of cells, a cell is a child or a list of children; the first cell of a row is its header.
function table(head, rows) {
  const cell = (words, i, tag, scope) => make(i ? tag : "th", i && tag === "td" ? {} : { scope }, ...[words].flat());
  const row = (cells, tag, scope) => make("tr", {}, ...cells.map((words, i) => cell(words, i, tag, scope)));
  const above = make("thead", {}, row(head, "th", "col"));
  const body = make("tbody", {}, ...rows.map((cells) => row(cells, "td", "row")));
  return make("div", { className: "wide", tabIndex: 0 }, make("table", {}, above, body));
}

function unfold(words, open, ...parts) {
  return make("details", { open }, make("summary", {}, words), ...parts);
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value);
  return make("dl", {}, ...known.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

const under = (words) => (words ? [small(words)] : []);
const measured = (value, pair) => [percent(value), ...under(interval(pair))];
const plainly = (value, pair) => [value.toFixed(3), ...under(pair?.map((p) => p.toFixed(3)).join(" to "))];

export const isSynthetic = (model) => /^phantom_ct\b/.test(model.dataset ?? "");

// One line for the head of the page.
export function summary(model) {
  // An image may have several findings, so their counts do not add up to the number of images.
  const counts = model.multilabel ? [] : Object.values(model.counts?.train ?? {}).filter(isNumber);
  const images = counts.reduce((a, b) => a + b, 0);
  const from = images ? `${plural(images, "image")} of ${model.dataset}` : model.dataset;
  const names = `${model.classes.slice(0, -1).join(", ")} and ${model.classes.at(-1)}`;
  return `${model.multilabel ? "Finds" : "Classifies"} ${names}. Trained on ${from}.`;
}

function intended(model) {
  const [height, width] = model.input.size;
  const windows = (model.hu_windows ?? []).map(([center, width]) => `${center} / ${width} HU`).join(", ");
  return [
    ["Input", `${width} x ${height} pixels, ${model.input.channels === 1 ? "grayscale" : "color"}`],
    ["Plane", model.position === "mid" ? `${model.plane}, middle slice` : model.plane],
    ["Stage", model.stage || "unmodified images"],
    ["CT window", windows && `${windows} (center / width, for DICOM)`],
    ["16-bit window", model.window ? `${model.window[0]} to ${model.window[1]}` : "none, 8-bit images only"],
  ];
}

function countTable(model) {
  const { counts = {}, patients = {} } = model;
  const splits = SPLITS.filter((split) => counts[split]);
  if (!splits.length) return [];
  const cell = (split, name) => {
    const people = patients?.[split]?.[name];
    return [count(counts[split][name] ?? 0), ...(isNumber(people) ? [small(plural(people, "patient"))] : [])];
  };
  const rows = model.classes.map((name) => [name, ...splits.map((split) => cell(split, name))]);
  return [make("h3", {}, "Images per class"), table(["", ...splits], rows)];
}

function scoreTable(model) {
  const levels = Object.keys(LEVELS).filter((level) => model.scores?.[level]);
  const names = Object.keys(SCORES).filter((name) => levels.some((level) => isNumber(model.scores[level][name])));
  if (!names.length) return [];
  const cell = (scores, name) => {
    if (!isNumber(scores[name])) return "";
    return (name.endsWith("accuracy") ? measured : plainly)(scores[name], scores.intervals?.[name]);
  };
  const rows = names.map((name) => [SCORES[name], ...levels.map((level) => cell(model.scores[level], name))]);
  const head = levels.map((level) => {
    const n = model.scores[level].n;
    return isNumber(n) ? plural(n, LEVELS[level]) : `${LEVELS[level]}s`;
  });
  return [make("h3", {}, "Scores on test"), table(["", ...head], rows), quiet("Small numbers are 95 % intervals.")];
}

function pointTables(model) {
  const parts = [];
  for (const rule of rules(model)) {
    const known = model.classes.filter((name) => model.points.slice?.[name]?.[rule]);
    const rows = known.map((name) => {
      const { threshold, sensitivity, specificity, intervals = {} } = model.points.slice[name][rule];
      const from = [name, small(`at ${percent(threshold)}`)];
      return [from, measured(sensitivity, intervals.sensitivity), measured(specificity, intervals.specificity)];
    });
    const title = ruleWords(rule)[1];
    parts.push(make("p", {}, `${title[0].toUpperCase()}${title.slice(1)}`));
    parts.push(table(["threshold", "sensitivity", "specificity"], rows));
  }
  if (!parts.length) return [];
  const words = "Thresholds were chosen on validation images; the rates are for test images.";
  return [unfold("Operating points", false, ...parts, quiet(words))];
}

// Names of the operating points, Youden's first.
export function rules(model) {
  const names = new Set(Object.values(model.points?.slice ?? {}).flatMap((points) => Object.keys(points)));
  return [...names].sort((a, b) => (b === "youden") - (a === "youden") || a.localeCompare(b));
}

function plain(value) {
  if (value === null || value === undefined || value === "") return "";
  if (Array.isArray(value)) return value.map(plain).filter(Boolean).join(", ");
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, inner]) => `${name} ${plain(inner)}`).join(", ");
}

function noveltyTable({ false_alarms, detection }) {
  const alarms = Object.entries(false_alarms).map(([split, rate]) => [`${split} images (false alarms)`, rate]);
  const rows = [...alarms, ...Object.entries(detection)].map(([kind, { n, rate, interval }]) => {
    return [kind, count(n), isNumber(rate) ? measured(rate, interval) : ""];
  });
  const words = "Images that are unlike the training images have a warning if they are recognized as such.";
  return [unfold("Unfamiliar images", false, table(["", "images", "with a warning"], rows), quiet(words))];
}

export function describe(model) {
  const { warnings = [], notice, data_title, data_licence, ...rest } = model.about ?? {};
  const about = Object.entries(rest).map(([name, value]) => [name.replaceAll("_", " "), plain(value)]);
  const caveats = make("ul", { className: "caveats" }, ...warnings.map((line) => make("li", {}, line)));
  at("model").replaceChildren(
    facts([
      ["Name", model.name],
      ["Classes", model.classes.join(", ")],
      ["Trained on", data_title ? `${model.dataset}: ${data_title}` : model.dataset],
      ["Data license", data_licence],
      ["Modality", { ct: "CT", xray: "X-ray" }[model.modality]],
      ...intended(model),
    ]),
    ...countTable(model),
    ...scoreTable(model),
    ...(warnings.length ? [unfold("Caveats", warnings.length < MAX_OPEN, caveats)] : []),
    ...pointTables(model),
    ...(model.novelty ? noveltyTable(model.novelty) : []),
    ...(about.length ? [unfold("Details", false, facts(about))] : []),
  );
}

// The limits of a file as text.
export function limits() {
  const [bytes, pixels] = [limit("file_bytes"), limit("pixels")];
  const parts = Number.isFinite(bytes) ? [`${size(bytes)} per file`] : [];
  if (Number.isFinite(pixels)) parts.push(`${+(pixels / 1e6).toFixed(1)} megapixels per image`);
  return parts.length ? `At most ${parts.join(", ")}.` : "";
}
