// The page of `python -m lungjax.serve`: images go to the service, a card each comes back. What a person or a file
// brings (names, messages) becomes text and never HTML; nothing is stored, and nothing is fetched from elsewhere.
import { Card, Series, explainWhenSeen, settings } from "./cards.js";
import { describe, isDrawn, limits, rules, summary } from "./model.js";
import { ask, byName, dropped, form, grouped, isDicom, limit, service } from "./service.js";
import { at, count, make, percent, plural, ruleWords, size } from "./words.js";

const FEW = 4; // images of a request; a DICOM series goes in one, for the service sums it up
const AT_ONCE = 2; // requests on their way
const MANY = 2000; // files of one drop
const list = { cards: [], series: [], queue: [], running: 0 };

// The model, and the token if the service wants one.

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
  at("drawn").hidden = !isDrawn(model);
  at("limits").textContent = limits();
  describe(model);
  options("rule", rules(model), (rule) => ruleWords(rule)[0]);
  options("method", model.methods ?? [], (name) => name.replaceAll("_", " "));
  at("layout").hidden = at("foot").hidden = false;
}

// Fills a choice; one that leaves none is not shown.
function options(id, names, words) {
  settings[id] = names[0] ?? "";
  at(id).replaceChildren(...names.map((name) => make("option", { value: name }, words(name))));
  at(`${id}-label`).hidden = names.length < 2;
  changed(id);
}

function changed(id) {
  settings[id] = at(id).value;
  if (id === "rule") {
    const found = `the threshold that had the ${ruleWords(settings.rule)[1]} on the validation images`;
    const words = `Positive: the probability reaches ${found}. The mark in a bar is that threshold.`;
    at("rule-words").textContent = settings.rule ? words : "";
    for (const one of [...list.cards, ...list.series]) one.draw();
  } else for (const card of list.cards) explainWhenSeen(card);
}

service.refused = (again) => {
  service.token = "";
  at("token").hidden = false;
  at("refused").hidden = !again;
  at("refused").textContent = again ? "The service does not know this token." : "";
  at("secret").value = "";
  at("secret").focus();
};

// Files in, cards out.

async function add(files) {
  if (!files.length || !service.model) return;
  const cards = files.slice(0, MANY).map((file) => new Card(file, { remove, retry }));
  at("results").hidden = false;
  at("cards").append(...cards.map((card) => card.node));
  list.cards.push(...cards);
  const heaviest = limit("file_bytes");
  for (const card of cards.filter((one) => one.file.size > heaviest))
    card.fail(`a file of ${size(card.file.size)}; the service takes up to ${size(heaviest)}`);
  progress();
  if (files.length > MANY) say(`${count(files.length)} files are more than ${count(MANY)}; the rest was left out`);
  const dicom = await Promise.all(cards.map((card) => isDicom(card.file)));
  const most = Math.min(limit("files"), MANY);
  list.queue.push(...grouped(cards.filter((card, i) => !dicom[i] && !card.done), Math.min(FEW, most)));
  const parts = grouped(cards.filter((card, i) => dicom[i] && !card.done), most);
  for (const part of parts) part.part = parts.length > 1;
  list.queue.push(...parts);
  pump();
}

function pump() {
  while (list.running < AT_ONCE && list.queue.length) {
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
    const said = await ask(`predict?${new URLSearchParams(settings.rule ? { rule: settings.rule } : {})}`, form(files));
    results = said.results;
    const series = (said.series ?? []).filter((one) => one.files > 1).map((one) => new Series(one, files, group.part));
    if (cards.some((card) => !card.gone)) {
      list.series.push(...series);
      at("series").append(...series.map((one) => one.node));
    }
  } catch (trouble) {
    if (!trouble.results && cards.length > 1 && !trouble.again) {
      list.queue.unshift(...cards.map((card) => [card])); // one of them spoils the rest
      return;
    }
    results = trouble.results ?? cards.map(() => ({ error: trouble.message, again: trouble.again }));
  }
  cards.forEach((card, i) => {
    if (!card.gone) told(card, results[i] ?? { error: "The service said nothing of this file." });
  });
  progress();
}

function told(card, result) {
  if (result.error) {
    card.fail(result.error, result.again);
    say(`${card.name}: no answer. ${result.error}`);
    return;
  }
  card.tell(result);
  explainWhenSeen(card);
  const doubt = result.warnings?.length ? `. Warning: ${result.warnings.join("; ")}` : "";
  say(`${card.name}: ${result.predicted}, ${percent(result.probabilities[result.predicted])}${doubt}`);
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
  at("said").textContent = "All images removed";
  at("choose").focus();
}

function progress() {
  const done = list.cards.filter((card) => card.done).length;
  const bad = list.cards.filter((card) => card.error).length;
  at("progress").max = Math.max(1, list.cards.length);
  at("progress").value = done;
  const failed = bad ? `, ${count(bad)} without an answer` : "";
  at("progress-text").textContent = `${count(done)} of ${plural(list.cards.length, "image")} done${failed}`;
  at("csv").disabled = at("json").disabled = !done;
}

let speaking = 0;
function say(words) {
  clearTimeout(speaking); // of many at once the last is read out, and how many are done
  speaking = setTimeout(() => (at("said").textContent = `${words}. ${at("progress-text").textContent}.`), 300);
}

// Results to take along, made here; the columns are those of `python -m lungjax.predict`.

// A spreadsheet takes a cell that begins with one of these signs for a formula.
const cell = (value) => `"${String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;

function csv() {
  const { classes, name, notice } = service.model;
  const head = ["file", "predicted", ...classes.map((one) => `p_${one}`), ...classes.map((one) => `called_${one}`)];
  const rows = list.cards.filter((card) => card.done).map(({ answer, name: file, error, decisions }) => {
    const called = (one) => decisions?.[one] && (decisions[one].called ? "yes" : "no");
    const numbers = classes.map((one) => answer?.probabilities[one]);
    const warnings = answer?.warnings?.join("; ");
    const said = [answer?.predicted, ...numbers, ...classes.map(called), answer?.unlike, warnings, error];
    return [file, ...said, settings.rule, name, notice];
  });
  const table = [[...head, "unlike", "warnings", "error", "rule", "model", "notice"], ...rows];
  return table.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function json() {
  const { name, dataset, classes, notice } = service.model;
  const told = ({ answer, decisions, error }) => (answer ? { ...answer, decisions } : { error });
  const results = list.cards.filter((card) => card.done).map((card) => ({ ...told(card), file: card.name }));
  const series = list.series.map((one) => ({ ...one.record, decisions: one.decisions }));
  const whole = { model: { name, dataset, classes }, notice, rule: settings.rule, results, series };
  return JSON.stringify(whole, null, 1) + "\n";
}

function save(words, type, ending) {
  const address = URL.createObjectURL(new Blob([words], { type }));
  const safe = service.model.name.replace(/[^\w.-]+/g, "_");
  make("a", { href: address, download: `${safe}-results.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// What a person does.

const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
const veil = (shown) => (at("veil").hidden = !shown || !service.model);

addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault(); // else the browser leaves the page and shows the file
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
