// The page of `python -m lungjax.serve`: each image is sent to the service and gets a card. File names and messages
// become text, never HTML; nothing is stored, and nothing is loaded from other sites.
import { Card, Series, explainWhenSeen, mostProbable, settings } from "./cards.js";
import { describe, isSynthetic, limits, rules, summary } from "./model.js";
import { ask, byName, dropped, form, grouped, isDicom, limit, service } from "./service.js";
import { at, count, make, percent, plural, ruleWords, size } from "./words.js";

const IMAGES_PER_REQUEST = 4; // a DICOM series is one request, since the service summarizes it
const MAX_RUNNING = 2; // requests at a time
const MAX_FILES = 2000; // per drop
const list = { cards: [], series: [], queue: [], running: 0 };

// The model, and the token if the service requires one.

async function start() {
  at("unreachable").hidden = true;
  try {
    service.model = await ask("model");
  } catch (trouble) {
    if (trouble.status === 401) return;
    at("unreachable-why").textContent = trouble.message;
    at("unreachable").hidden = false;
    return;
  }
  const model = service.model;
  at("token").hidden = true;
  at("title").textContent = model.name;
  document.title = `${model.name} · lungjax`;
  at("purpose").textContent = summary(model);
  at("synthetic").hidden = !isSynthetic(model);
  at("limits").textContent = limits();
  describe(model);
  options("rule", rules(model), (rule) => ruleWords(rule)[0]);
  options("method", model.methods ?? [], (name) => name.replaceAll("_", " "));
  at("layout").hidden = at("foot").hidden = false;
}

// Fills a menu, which is hidden if it has a single option.
function options(id, names, words) {
  settings[id] = names[0] ?? "";
  at(id).replaceChildren(...names.map((name) => make("option", { value: name }, words(name))));
  at(`${id}-label`).hidden = names.length < 2;
  changed(id);
}

function changed(id) {
  settings[id] = at(id).value;
  if (id === "rule") {
    const threshold = `the threshold with the ${ruleWords(settings.rule)[1]} on the validation images`;
    const words = `A class is positive if its probability reaches ${threshold}, which is marked in the bar.`;
    at("rule-words").textContent = settings.rule ? words : "";
    for (const one of [...list.cards, ...list.series]) one.draw();
  } else for (const card of list.cards) explainWhenSeen(card);
}

service.refused = (again) => {
  service.token = "";
  at("token").hidden = false;
  at("refused").hidden = !again;
  at("refused").textContent = again ? "Wrong token." : "";
  at("secret").value = "";
  at("secret").focus();
};

// Files in, cards out.

async function add(files) {
  if (!files.length || !service.model) return;
  const cards = files.slice(0, MAX_FILES).map((file) => new Card(file, { remove, retry }));
  at("results").hidden = false;
  at("cards").append(...cards.map((card) => card.node));
  list.cards.push(...cards);
  const heaviest = limit("file_bytes");
  for (const card of cards.filter((one) => one.file.size > heaviest))
    card.fail(`a file of ${size(card.file.size)}; the limit is ${size(heaviest)}`);
  progress();
  if (files.length > MAX_FILES) say(`${count(files.length)} files: only the first ${count(MAX_FILES)} are used`);
  const dicom = await Promise.all(cards.map((card) => isDicom(card.file)));
  const most = Math.min(limit("files"), MAX_FILES);
  list.queue.push(...grouped(cards.filter((card, i) => !dicom[i] && !card.done), Math.min(IMAGES_PER_REQUEST, most)));
  const parts = grouped(cards.filter((card, i) => dicom[i] && !card.done), most);
  for (const part of parts) part.part = parts.length > 1;
  list.queue.push(...parts);
  pump();
}

function pump() {
  while (list.running < MAX_RUNNING && list.queue.length) {
    list.running += 1;
    classify(list.queue.shift()).finally(() => {
      list.running -= 1;
      pump();
    });
  }
}

async function classify(group) {
  const cards = group.filter((card) => !card.gone);
  if (!cards.length) return;
  for (const card of cards) card.words.textContent = "Computing …";
  const files = cards.map((card) => card.file);
  let results;
  try {
    const answer = await ask(`predict?${new URLSearchParams(settings.rule ? { rule: settings.rule } : {})}`, form(files));
    results = answer.results;
    const series = (answer.series ?? []).filter((one) => one.files > 1).map((one) => new Series(one, files, group.part));
    if (cards.some((card) => !card.gone)) {
      list.series.push(...series);
      at("series").append(...series.map((one) => one.node));
    }
  } catch (trouble) {
    if (!trouble.results && cards.length > 1 && !trouble.again) {
      list.queue.unshift(...cards.map((card) => [card])); // one file may fail the others
      return;
    }
    results = trouble.results ?? cards.map(() => ({ error: trouble.message, again: trouble.again }));
  }
  cards.forEach((card, i) => {
    if (!card.gone) finish(card, results[i] ?? { error: "The service sent no result for this file." });
  });
  progress();
}

function finish(card, result) {
  if (result.error) {
    card.fail(result.error, result.again);
    say(`${card.name}: no prediction. ${result.error}`);
    return;
  }
  card.show(result);
  explainWhenSeen(card);
  const warning = result.warnings?.length ? `. Warning: ${result.warnings.join("; ")}` : "";
  const best = mostProbable(result);
  say(`${card.name}: ${best}, ${percent(result.probabilities[best])}${warning}`);
}

function retry(card) {
  card.reset();
  card.title.focus();
  list.queue.push([card]);
  progress();
  pump();
}

function remove(card) {
  const i = list.cards.indexOf(card);
  list.cards.splice(i, 1);
  card.drop();
  if (!list.cards.length) return clear();
  list.cards[Math.min(i, list.cards.length - 1)].remove.focus();
  progress();
}

function clear() {
  for (const card of list.cards) card.drop();
  Object.assign(list, { cards: [], series: [], queue: [] });
  at("series").replaceChildren();
  at("results").hidden = true;
  at("announcement").textContent = "All images removed";
  at("choose").focus();
}

function progress() {
  const done = list.cards.filter((card) => card.done).length;
  const bad = list.cards.filter((card) => card.error).length;
  at("progress").max = Math.max(1, list.cards.length);
  at("progress").value = done;
  const failed = bad ? `, ${count(bad)} failed` : "";
  at("progress-text").textContent = `${count(done)} of ${plural(list.cards.length, "image")} done${failed}`;
  at("csv").disabled = at("json").disabled = !done;
}

let speaking = 0;
function say(words) {
  clearTimeout(speaking); // only the last message of a burst is announced, with the progress
  speaking = setTimeout(() => (at("announcement").textContent = `${words}. ${at("progress-text").textContent}.`), 300);
}

// Downloads, created here; the columns are those of `python -m lungjax.predict`.

// Spreadsheets read cells that start with one of these characters as formulas.
const cell = (value) => `"${String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;

function csv() {
  const { classes, name, notice } = service.model;
  const head = ["file", "predicted", ...classes.map((one) => `p_${one}`), ...classes.map((one) => `called_${one}`)];
  const rows = list.cards.filter((card) => card.done).map(({ answer, name: file, error, decisions }) => {
    const called = (one) => decisions?.[one] && (decisions[one].called ? "yes" : "no");
    const numbers = classes.map((one) => answer?.probabilities[one]);
    const warnings = answer?.warnings?.join("; ");
    const values = [answer?.predicted, ...numbers, ...classes.map(called), answer?.novelty, warnings, error];
    return [file, ...values, settings.rule, name, notice];
  });
  const table = [[...head, "novelty", "warnings", "error", "rule", "model", "notice"], ...rows];
  return table.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function json() {
  const { name, dataset, classes, notice } = service.model;
  const content = ({ answer, decisions, error }) => (answer ? { ...answer, decisions } : { error });
  const results = list.cards.filter((card) => card.done).map((card) => ({ ...content(card), file: card.name }));
  const series = list.series.map((one) => ({ ...one.record, decisions: one.decisions }));
  const answer = { model: { name, dataset, classes }, notice, rule: settings.rule, results, series };
  return JSON.stringify(answer, null, 1) + "\n";
}

function save(words, type, ending) {
  const address = URL.createObjectURL(new Blob([words], { type }));
  const safe = service.model.name.replace(/[^\w.-]+/g, "_");
  make("a", { href: address, download: `${safe}-results.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// User actions.

const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
const veil = (shown) => (at("veil").hidden = !shown || !service.model);

addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault(); // otherwise the browser would open the file
  event.dataTransfer.dropEffect = "copy";
  veil(true);
});
addEventListener("dragleave", (event) => event.relatedTarget ?? veil(false));
addEventListener("drop", async (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  veil(false);
  add(await dropped(event.dataTransfer));
});
addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  add(files);
});
for (const id of ["choose", "folder"])
  at(id).addEventListener("change", () => {
    const files = [...at(id).files].filter((file) => !file.name.startsWith("."));
    add(id === "folder" ? files.sort(byName) : files);
    at(id).value = ""; // so that the same file can be chosen again
  });
for (const id of ["rule", "method"]) at(id).addEventListener("change", () => changed(id));
at("clear").addEventListener("click", clear);
at("csv").addEventListener("click", () => save(csv(), "text/csv", "csv"));
at("json").addEventListener("click", () => save(json(), "application/json", "json"));
at("reconnect").addEventListener("click", start);
at("token").addEventListener("submit", (event) => {
  event.preventDefault();
  service.token = at("secret").value.trim();
  start();
});
start();
