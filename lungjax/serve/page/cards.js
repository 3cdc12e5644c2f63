// What the page shows of one image or of a series: probabilities, decisions, warnings, and the heat map.
import { ask, form, service } from "./service.js";
import { interval, make, percent, plural, sentence } from "./words.js";

export const settings = { rule: "", method: "" };

const AT_ONCE = 2; // heat maps on their way
const LEVELS = { slice: "test images", patient: "test patients" };
const EVEN = "It is the same everywhere: this method can't tell places apart here.";
let cards = 0;

function bar(name, p, decision, index = -1) {
  const track = make("span", { className: "track", ariaHidden: "true" });
  if (p !== null) {
    const filled = make("b");
    filled.style.width = `${Math.min(100, 100 * p)}%`;
    track.append(filled);
  }
  if (decision) {
    const mark = make("i");
    mark.style.left = `${Math.min(100, 100 * decision.threshold)}%`;
    track.append(mark);
  }
  const called = decision ? (decision.called ? "● positive" : "○ negative") : "";
  return make(
    "li",
    { "data-class": index },
    make("span", {}, name),
    make("span", { className: "number" }, p === null ? "–" : percent(p)),
    make("span", { className: decision?.called ? "called yes" : "called" }, called),
    track,
  );
}

// What the chosen operating point says of a record. The service decides by the rule that it was asked for; by the
// others the page compares with the thresholds of the same model.json.
function decided(record, level) {
  const points = service.model.points?.[level] ?? {};
  const found = {};
  for (const [name, p] of Object.entries(record.probabilities)) {
    const point = points[name]?.[settings.rule];
    const own = record.decisions?.[name];
    if (own?.rule === settings.rule) found[name] = { ...point, ...own };
    else if (point) found[name] = { ...point, called: p >= point.threshold, rule: settings.rule };
  }
  return found;
}

const within = (pair) => (pair ? ` (95 % interval ${interval(pair)})` : "");

function points(decisions, level) {
  const lines = [];
  for (const [name, point] of Object.entries(decisions)) {
    if (!point.called) continue;
    const sensitivity = `sensitivity ${percent(point.sensitivity)}${within(point.intervals?.sensitivity)}`;
    const specificity = `specificity ${percent(point.specificity)}${within(point.intervals?.specificity)}`;
    const reached = `it reaches the threshold of ${percent(point.threshold)}.`;
    const worth = ` On ${LEVELS[level]} that threshold has ${sensitivity} and ${specificity}.`;
    lines.push(make("p", {}, make("strong", {}, `${name} is called positive: `), reached, worth));
  }
  const several = "Each class is decided by itself against all others, so several can be positive.";
  if (lines.length > 1) lines.push(make("p", {}, several));
  if (!lines.length && Object.keys(decisions).length) lines.push(make("p", {}, "No class reaches its threshold."));
  return make("div", { className: "points" }, ...lines);
}

// Draws a record and returns the decisions that it shows.
function show(body, record, level) {
  const decisions = decided(record, level);
  const lines = [...(record.warnings ?? [])];
  if (!lines.length && record.unlike > 1) lines.push("This image is unlike those that the model was trained on.");
  const parts = lines.map((line) => make("p", {}, make("strong", {}, "Warning. "), sentence(line)));
  const best = percent(record.probabilities[record.predicted]);
  const bars = Object.entries(record.probabilities).map(([name, p], i) => bar(name, p, decisions[name] ?? null, i));
  body.className = lines.length ? "answer doubtful" : "answer";
  body.replaceChildren(
    ...(parts.length ? [make("div", { className: "warning" }, ...parts)] : []),
    make("p", { className: "top-class" }, "Most probable: ", make("strong", {}, record.predicted), `, ${best}`),
    make("ul", { className: "bars" }, ...bars),
    points(decisions, level),
  );
  return decisions;
}

// Whether a picture has one colour alone.
function isEven(picture) {
  const canvas = make("canvas", { width: 32, height: 32 });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, 32, 32);
  const pixels = new Uint32Array(context.getImageData(0, 0, 32, 32).data.buffer);
  return pixels.every((pixel) => pixel === pixels[0]);
}

// A card for a file: waiting at first, then an answer or why there is none. `act` has remove(card) and retry(card).
export class Card {
  constructor(file, act) {
    this.file = file;
    this.name = file.name || "image without a name";
    this.act = act;
    this.maps = new Map();
    this.node = make("li", { className: "card" });
    this.reset();
  }

  reset() {
    Object.assign(this, { answer: null, error: "", done: false, heat: null });
    const id = `card-${++cards}`;
    this.title = make("h3", { className: "name", id, tabIndex: -1, title: this.name }, this.name);
    this.remove = make("button", { className: "remove", type: "button" }, "Remove");
    this.remove.setAttribute("aria-label", `Remove ${this.name}`);
    this.remove.addEventListener("click", () => this.act.remove(this));
    this.words = make("span", {}, "Waiting …");
    this.frame = make("div", { className: "frame" }, this.words);
    const [height, width] = service.model.input?.size ?? [1, 1];
    this.frame.style.aspectRatio = `${width} / ${height}`; // the place of the picture that is to come
    this.caption = make("figcaption", {}, " ");
    this.controls = make("fieldset", { className: "controls", disabled: true });
    if ((service.model.methods ?? []).length) this.addControls(); // before they are of use, so that nothing moves later
    this.picture = make("figure", { className: "picture" }, this.frame, this.caption, this.controls);
    const empty = service.model.classes.map((name) => bar(name, null, null));
    const later = make("p", { className: "top-class" }, " ");
    this.body = make("div", { className: "answer waiting" }, later, make("ul", { className: "bars" }, ...empty));
    const top = make("div", { className: "top" }, this.title, this.remove);
    this.node.className = "card";
    this.node.setAttribute("aria-labelledby", id);
    this.node.replaceChildren(top, this.body, this.picture);
  }

  // The service's record of the file.
  tell(record) {
    this.answer = record;
    this.done = true;
    this.draw();
    if (!(service.model.methods ?? []).length) this.preview();
    else this.words.textContent = "Heat map …";
  }

  draw() {
    if (this.answer) this.decisions = show(this.body, this.answer, "slice");
  }

  fail(message, again) {
    this.error = message;
    this.done = true;
    this.picture.hidden = true;
    this.node.classList.add("bare");
    const button = make("button", { type: "button" }, "Try again");
    button.addEventListener("click", () => this.act.retry(this));
    this.body.className = "answer";
    this.body.replaceChildren(
      make("p", { className: "problem" }, "No answer for this file"),
      make("p", {}, sentence(message)),
      ...(again ? [make("p", {}, button)] : []),
    );
  }

  // Asks for the heat map of a class, once, and draws it unless another one was wanted meanwhile.
  async explain(target, method = settings.method) {
    const key = JSON.stringify([target, method]);
    this.wanted = key;
    if (!this.maps.has(key)) {
      const query = new URLSearchParams({ class: target, method });
      this.maps.set(key, ask(`explain?${query}`, form([this.file])).then((said) => said.results[0]));
    }
    if (this.heat) this.caption.textContent = "Computing …";
    try {
      const found = await this.maps.get(key);
      if (this.wanted === key) this.paint(found, target);
    } catch (trouble) {
      this.maps.delete(key);
      if (this.wanted === key) this.unexplained(trouble.message);
    }
  }

  paint(found, target) {
    if (!this.heat) {
      this.image = make("img", { alt: `${this.name} as the network sees it` });
      this.heat = make("img", { className: "heat" });
      this.frame.replaceChildren(this.image, this.heat);
      this.controls.disabled = false;
      this.pick.value = target;
    }
    this.image.src = found.image;
    this.heat.src = found.heat;
    this.heat.alt = `heat map over it: what spoke for ${target}`;
    const words = `What spoke for ${target}, over the image as the network sees it (${found.method})`;
    this.caption.textContent = words;
    this.heat.decode().then(() => {
      if (isEven(this.heat)) this.caption.textContent = `${words}. ${EVEN}`;
    });
    this.blend();
  }

  blend() {
    this.heat.hidden = !this.shown.checked;
    this.heat.style.opacity = String(this.slider.value / 100);
    this.slider.disabled = !this.shown.checked;
  }

  addControls() {
    const option = (name) => make("option", { value: name }, name);
    const classes = service.model.classes.map(option);
    this.shown = make("input", { type: "checkbox", checked: true, "aria-label": `Heat map over ${this.name}` });
    this.slider = make("input", { type: "range", min: 0, max: 100, value: 50, step: 5 });
    this.slider.setAttribute("aria-label", `Strength of the heat map over ${this.name}`);
    this.pick = make("select", { "aria-label": `Class that the heat map over ${this.name} explains` }, ...classes);
    for (const control of [this.shown, this.slider]) control.addEventListener("input", () => this.blend());
    this.pick.addEventListener("change", () => this.explain(this.pick.value));
    this.controls.replaceChildren(
      make("div", { className: "scale", ariaHidden: "true" }, "less", make("i"), "more"),
      make("label", {}, this.shown, "Heat map", this.slider),
      make("label", {}, "Explain", this.pick),
    );
  }

  unexplained(message) {
    if (!this.heat) this.preview();
    else this.heat.hidden = true;
    this.caption.textContent = `No heat map: ${sentence(message)}`;
  }

  // The file as the browser shows it, where there is no heat map. It can't show DICOM, and most can't TIFF.
  preview() {
    this.local ??= URL.createObjectURL(this.file);
    const image = make("img", { alt: this.name });
    this.words.textContent = "No preview";
    image.addEventListener("load", () => this.frame.replaceChildren(image));
    image.src = this.local;
  }

  drop() {
    watch.unobserve(this.node);
    if (this.local) URL.revokeObjectURL(this.local);
    this.gone = true;
    this.node.remove();
  }
}

// A heat map costs more than an answer, so it is computed when its card comes near the screen.
const byNode = new WeakMap();
const soon = [];
let running = 0;
const watch = new IntersectionObserver(
  (seen) => {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      watch.unobserve(target);
      soon.push(byNode.get(target));
    }
    next();
  },
  { rootMargin: "400px" },
);

function next() {
  while (running < AT_ONCE && soon.length) {
    const card = soon.shift();
    if (card.gone || !card.answer) continue;
    running += 1;
    card.explain(card.heat ? card.pick.value : card.answer.predicted).finally(() => {
      running -= 1;
      next();
    });
  }
}

export function explainWhenSeen(card) {
  if (!(service.model.methods ?? []).length || !card.answer) return;
  byNode.set(card.node, card);
  watch.observe(card.node);
}

// What is said of a series as a whole, by the operating points of patients where the model has them.
export class Series {
  constructor(record, files, part) {
    this.record = record;
    this.body = make("div", { className: "answer" });
    const names = files.map((file) => make("li", {}, file.name));
    const all = make("ul", { className: "quiet" }, ...names);
    const sent = make("details", {}, make("summary", {}, "Files of this request"), all);
    const whole = `Series of ${plural(record.files, "image")}: the mean of their probabilities`;
    const top = make("div", { className: "top" }, make("h3", { className: "name" }, whole));
    const words = "There were too many for one request, so each part is summed up by itself.";
    const note = part ? [make("p", { className: "quiet" }, words)] : [];
    this.node = make("article", { className: "card series" }, top, this.body, ...note, sent);
    this.draw();
  }

  draw() {
    const level = Object.keys(service.model.points?.patient ?? {}).length ? "patient" : "slice";
    this.decisions = show(this.body, this.record, level);
  }
}
