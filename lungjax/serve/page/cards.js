// Cards of one image or one series: probabilities, decisions, warnings, and the saliency map.
import { ask, form, service } from "./service.js";
import { interval, make, percent, plural, sentence } from "./words.js";

export const settings = { rule: "", method: "" };

const MAX_RUNNING = 2; // requests for saliency maps at a time
const LEVELS = { slice: "test images", patient: "test patients" };
const UNIFORM = "The map is uniform, so this method does not highlight any region of this image.";
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

// The class, or the finding of images with several, that has the highest probability.
export function mostProbable(record) {
  return Object.keys(record.probabilities).reduce((a, b) => (record.probabilities[b] > record.probabilities[a] ? b : a));
}

// Decisions of a record at the selected operating point. The service applies the rule of the request; for the other
// rules the page compares with the thresholds of the same model.json.
function decide(record, level) {
  const points = service.model.points?.[level] ?? {};
  const decisions = {};
  for (const [name, p] of Object.entries(record.probabilities)) {
    const point = points[name]?.[settings.rule];
    const own = record.decisions?.[name];
    if (own?.rule === settings.rule) decisions[name] = { ...point, ...own };
    else if (point) decisions[name] = { ...point, called: p >= point.threshold, rule: settings.rule };
  }
  return decisions;
}

const within = (pair) => (pair ? ` (95 % interval ${interval(pair)})` : "");

function points(decisions, level) {
  const lines = [];
  for (const [name, point] of Object.entries(decisions)) {
    if (!point.called) continue;
    const sensitivity = `sensitivity ${percent(point.sensitivity)}${within(point.intervals?.sensitivity)}`;
    const specificity = `specificity ${percent(point.specificity)}${within(point.intervals?.specificity)}`;
    const reached = `it reaches the threshold of ${percent(point.threshold)}.`;
    const rates = ` On ${LEVELS[level]} this threshold has ${sensitivity} and ${specificity}.`;
    lines.push(make("p", {}, make("strong", {}, `${name} is positive: `), reached, rates));
  }
  const several = "Each class is decided on its own, so several can be positive.";
  if (lines.length > 1) lines.push(make("p", {}, several));
  if (!lines.length && Object.keys(decisions).length) lines.push(make("p", {}, "No class reaches its threshold."));
  return make("div", { className: "points" }, ...lines);
}

// Draws a record and returns its decisions.
function drawRecord(body, record, level) {
  const decisions = decide(record, level);
  const lines = [...(record.warnings ?? [])];
  if (!lines.length && record.novelty > 1) lines.push("This image is unlike the training images.");
  const parts = lines.map((line) => make("p", {}, make("strong", {}, "Warning. "), sentence(line)));
  const best = mostProbable(record);
  const bars = Object.entries(record.probabilities).map(([name, p], i) => bar(name, p, decisions[name] ?? null, i));
  body.className = lines.length ? "answer doubtful" : "answer";
  body.replaceChildren(
    ...(parts.length ? [make("div", { className: "warning" }, ...parts)] : []),
    make("p", { className: "top-class" }, "Most probable: ", make("strong", {}, best), `, ${percent(record.probabilities[best])}`),
    make("ul", { className: "bars" }, ...bars),
    points(decisions, level),
  );
  return decisions;
}

// Whether a picture has a single color.
function isUniform(picture) {
  const canvas = make("canvas", { width: 32, height: 32 });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, 32, 32);
  const pixels = new Uint32Array(context.getImageData(0, 0, 32, 32).data.buffer);
  return pixels.every((pixel) => pixel === pixels[0]);
}

// The card of a file: waiting, then a prediction or an error. `act` has remove(card) and retry(card).
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
    this.frame.style.aspectRatio = `${width} / ${height}`; // reserves the place of the picture
    this.caption = make("figcaption", {}, " ");
    this.controls = make("fieldset", { className: "controls", disabled: true });
    if ((service.model.methods ?? []).length) this.addControls(); // disabled at first; nothing moves later
    this.picture = make("figure", { className: "picture" }, this.frame, this.caption, this.controls);
    const empty = service.model.classes.map((name) => bar(name, null, null));
    const later = make("p", { className: "top-class" }, " ");
    this.body = make("div", { className: "answer waiting" }, later, make("ul", { className: "bars" }, ...empty));
    const top = make("div", { className: "top" }, this.title, this.remove);
    this.node.className = "card";
    this.node.setAttribute("aria-labelledby", id);
    this.node.replaceChildren(top, this.body, this.picture);
  }

  // Shows the record of the file.
  show(record) {
    this.answer = record;
    this.done = true;
    this.draw();
    if (!(service.model.methods ?? []).length) this.preview();
    else this.words.textContent = "Saliency map …";
  }

  draw() {
    if (this.answer) this.decisions = drawRecord(this.body, this.answer, "slice");
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
      make("p", { className: "problem" }, "No prediction for this file"),
      make("p", {}, sentence(message)),
      ...(again ? [make("p", {}, button)] : []),
    );
  }

  // Requests the saliency map of a class once, and draws it unless another one was requested meanwhile.
  async explain(target, method = settings.method) {
    const key = JSON.stringify([target, method]);
    this.requested = key;
    if (!this.maps.has(key)) {
      const query = new URLSearchParams({ class: target, method });
      this.maps.set(key, ask(`explain?${query}`, form([this.file])).then((answer) => answer.results[0]));
    }
    if (this.heat) this.caption.textContent = "Computing …";
    try {
      const result = await this.maps.get(key);
      if (this.requested === key) this.paint(result, target);
    } catch (trouble) {
      this.maps.delete(key);
      if (this.requested === key) this.unexplained(trouble.message);
    }
  }

  paint(result, target) {
    if (!this.heat) {
      this.image = make("img", { alt: `${this.name} as network input` });
      this.heat = make("img", { className: "heat" });
      this.frame.replaceChildren(this.image, this.heat);
      this.controls.disabled = false;
      this.pick.value = target;
    }
    this.image.src = result.image;
    this.heat.src = result.heat;
    this.heat.alt = `saliency map for ${target}`;
    const words = `Saliency map for ${target} over the network input (${result.method})`;
    this.caption.textContent = words;
    this.heat.decode().then(() => {
      if (isUniform(this.heat)) this.caption.textContent = `${words}. ${UNIFORM}`;
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
    this.shown = make("input", { type: "checkbox", checked: true, "aria-label": `Saliency map over ${this.name}` });
    this.slider = make("input", { type: "range", min: 0, max: 100, value: 50, step: 5 });
    this.slider.setAttribute("aria-label", `Opacity of the saliency map over ${this.name}`);
    this.pick = make("select", { "aria-label": `Class of the saliency map over ${this.name}` }, ...classes);
    for (const control of [this.shown, this.slider]) control.addEventListener("input", () => this.blend());
    this.pick.addEventListener("change", () => this.explain(this.pick.value));
    this.controls.replaceChildren(
      make("div", { className: "scale", ariaHidden: "true" }, "less", make("i"), "more"),
      make("label", {}, this.shown, "Saliency map", this.slider),
      make("label", {}, "Explain", this.pick),
    );
  }

  unexplained(message) {
    if (!this.heat) this.preview();
    else this.heat.hidden = true;
    this.caption.textContent = `No saliency map: ${sentence(message)}`;
  }

  // The file as displayed by the browser, without a saliency map. Browsers can't display DICOM, and most not TIFF.
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

// A saliency map costs more than a prediction, so it is computed when its card approaches the viewport.
const byNode = new WeakMap();
const pending = [];
let running = 0;
const watch = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watch.unobserve(target);
      pending.push(byNode.get(target));
    }
    next();
  },
  { rootMargin: "400px" },
);

function next() {
  while (running < MAX_RUNNING && pending.length) {
    const card = pending.shift();
    if (card.gone || !card.answer) continue;
    running += 1;
    card.explain(card.heat ? card.pick.value : mostProbable(card.answer)).finally(() => {
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

// The card of a series, at the operating points of patients if the model has them.
export class Series {
  constructor(record, files, part) {
    this.record = record;
    this.body = make("div", { className: "answer" });
    const names = files.map((file) => make("li", {}, file.name));
    const all = make("ul", { className: "quiet" }, ...names);
    const sent = make("details", {}, make("summary", {}, "Files of this request"), all);
    const title = `Series of ${plural(record.files, "image")}: the ${service.model.aggregate} of their probabilities`;
    const top = make("div", { className: "top" }, make("h3", { className: "name" }, title));
    const words = "There were too many files for one request, so each part is summarized separately.";
    const note = part ? [make("p", { className: "quiet" }, words)] : [];
    this.node = make("article", { className: "card series" }, top, this.body, ...note, sent);
    this.draw();
  }

  draw() {
    const level = Object.keys(service.model.points?.patient ?? {}).length ? "patient" : "slice";
    this.decisions = drawRecord(this.body, this.record, level);
  }
}
