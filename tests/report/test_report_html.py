"""report.html: one whole page, whatever the names, whatever a report lacks; numbers and pictures are the run's own."""

import base64
import io
import itertools
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from lungjax.config import Config, EvalConfig, ModelConfig, OptimConfig
from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.report import html, plots, style, write
from lungjax.report import page as report_page

EVIL = ('<script>alert("x")</script>', "a & b's | c", "NonCOVID")
CONFIG = Config(
    name="small</title>",
    model=ModelConfig(name="cbr_tiny"),
    optim=OptimConfig(lr=0.0125),
    eval=EvalConfig(examples=3, prevalence=0.1, draws=0),
)
FACTS = {
    "dataset": "folder/mine",
    "counts": {"train": dict(zip(EVIL, (50, 40, 30), strict=True))},
    "parameters": 25442,
    "steps": 60,
    "versions": {"lungjax": "0.1.0", "jax": "0.10.2"},
}
ABOUT = {
    "title": "slices",
    "licence": "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).",
    "citation": "A <b> et al.",
    "clean": "by patient",
}
VOID = {"meta", "img", "br"}


def make(n=36, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // 2 % 3
    scores = rng.dirichlet(np.ones(3), n)
    ids = np.array([f'"><img src=x onerror=alert({i})>.png' for i in range(n)])
    groups = np.array([f"p{i // 2}" for i in range(n)])
    sources = np.array(["here<i>", "there"])[np.arange(n) % 2]
    return Predictions(ids, groups, sources, labels, scores.astype(np.float32), EVIL)


def image(row):
    return np.full((8, 8, 1), 7 * row % 256, np.uint8)


def split(leaks):
    return {"images": 20, "exact_twin_in_train": 1, "near_twin_in_train": 2, "group_in_train": 3, "any": leaks}


def summary(leaks=5):
    counts = {"images": dict.fromkeys(EVIL, 11), "groups": dict.fromkeys(EVIL, 4)}
    return {
        "name": "folder/mine", "images": 99, "classes": list(EVIL), "group_name": "patients", "groups": 33,
        "protocols": {"clean": {"train": counts, "val": counts, "test": counts}},
        "sources": {"here<i>": {EVIL[0]: 9}, "": {EVIL[1]: 8}},
        "sizes": {"width": [10, 20, 30], "height": [11, 21, 31], "common": [["10 x 11", 1234]]},
        "pixels": {"mean": 0.5, "std": 0.25},
        "duplicates": {"sets": 1, "images": 2, "sets_with_several_labels": 0},
        "twins": {"near_pairs": 6, "left_out": 7, "leaks": {"clean": {"test": split(leaks)}}},
        "groups_with_several_labels": 0, "skipped": ["<x>.png: broken"] * 25, "unstaged": [],
        "notes": ["a note & more"], "warnings": ["a <warning>"],
    }  # fmt: skip


class Page(HTMLParser):
    """What a page is made of; raises if a tag is closed that isn't the last one open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.tables, self.at = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "table" in self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += " " * ("small" in self.open) + data

    def table(self, *head):
        """The one table whose first row begins so."""
        (found,) = [table for table in self.tables if table and tuple(table[0][: len(head)]) == head]
        assert len({len(row) for row in found}) == 1, "ragged rows"
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, and what `explain` was asked."""
    workdir, asked = tmp_path_factory.mktemp("page"), []

    def explain(images, targets):
        asked.append((images, targets))
        return np.tile(np.linspace(0, 1, 8, dtype=np.float32), (len(images), 8, 1))

    results = {"test": make(), "val": make(seed=1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)
        write.write_report(workdir, CONFIG, results, [], FACTS, image, explain, summary(), ABOUT)
    return workdir, asked


def test_the_page_is_whole_and_asks_for_nothing(run):
    workdir, _ = run
    text = (workdir / "report.html").read_text("utf-8")
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "i", "link", "iframe", "object", "form", "base"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert sorted(link[1:] for link in links if link.startswith("#")) == sorted(ids)
    assert all(link.startswith(("#", "https://")) for link in links)
    assert "https://creativecommons.org/licenses/by/4.0/" in links  # without the bracket and the point behind it
    assert all("href" not in attrs for tag, attrs in page.tags if tag != "a")
    assert "url(" not in text and "@import" not in text
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:")
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_every_picture_is_in_the_page(run):
    workdir, _ = run
    page = Page((workdir / "report.html").read_text("utf-8"))
    held = []
    for attrs in [attrs for tag, attrs in page.tags if tag == "img"]:
        kind, _, data = attrs["src"].partition(",")
        assert kind == "data:image/png;base64" and attrs["alt"]
        held.append(base64.b64decode(data, validate=True))
        with Image.open(io.BytesIO(held[-1])) as picture:
            assert (attrs["width"], attrs["height"]) == tuple(map(str, picture.size))
    saved = {path.name: path.read_bytes() for path in (workdir / "plots").iterdir()}
    assert "mistakes.png" in saved and sorted(held) == sorted(saved.values())


def test_names_are_shown_as_they_are(run):
    page = Page((run[0] / "report.html").read_text("utf-8"))
    confusion = page.tables[[t[0][0] for t in page.tables].index("true \\ predicted")]
    assert [row[0] for row in confusion[1:]] == list(EVIL) and confusion[0][1:] == list(EVIL)
    assert page.text.startswith("small</title>: cbr_tiny on folder/mine")
    assert "<x>.png: broken" in page.text and "and 5 more" in page.text and "a <warning>" in page.text
    assert html.text("a\x00b\x1b") == "a\ufffdb\ufffd" and html.text("a\tb\n") == "a\tb\n"


def test_mistakes_are_the_wrong_ones_and_explained_for_what_was_named(run):
    workdir, asked = run
    test = make()
    wrong = plots.choose_examples(test, 3)[1]
    ((images, targets),) = asked
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    assert images[:, 0, 0, 0].tolist() == [7 * row % 256 for row in wrong]
    assert targets.tolist() == test.probabilities[wrong].argmax(axis=1).tolist()
    assert all(test.labels[row] != target for row, target in zip(wrong, targets, strict=True))
    told = json.loads((workdir / "report.json").read_text())["mistakes"]
    assert [one["id"] for one in told] == test.ids[wrong].tolist()
    table = Page((workdir / "report.html").read_text("utf-8")).table("image (test)")
    assert [row[:3] for row in table[1:]] == [
        [str(test.ids[row]), EVIL[test.labels[row]], EVIL[test.predicted[row]]] for row in wrong
    ]
    assert [row[3] for row in table[1:]] == [f"{test.probabilities[row].max():.3f}" for row in wrong]


def test_the_overlay_shows_the_map(tmp_path):
    test, row = make(), plots.choose_examples(make(), 1)[1]
    dark, heat = np.zeros((1, 64, 64, 1), np.uint8), np.zeros((1, 64, 64), np.float32)
    heat[:, :, 32:] = 1
    plots.mistakes(test, row, dark, heat, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = pixels[pixels.shape[0] // 3]
    assert (middle[len(middle) // 4] == 0).all()  # the image itself is black
    # Half of viridis's two ends, (68, 1, 84) and (253, 231, 37): violet where nothing is, yellow where the map is 1.
    np.testing.assert_allclose(middle[int(len(middle) * 0.6)], (34, 0, 42), atol=3)
    np.testing.assert_allclose(middle[int(len(middle) * 0.9)], (126, 115, 18), atol=3)


def test_numbers_and_their_intervals_are_the_reports(run):
    workdir, _ = run
    said = json.loads((workdir / "report.json").read_text())
    for unit in ("slice", "patient"):
        said["test"][unit]["intervals"] = {"accuracy": [0.1234, 0.5678], f"per_class.{EVIL[1]}.recall": [0.2, 0.9]}
    for unit in ("slice", "patient"):
        said["val"][unit].pop("intervals", None)
    point = {"threshold": 0.4, "sensitivity": 0.81, "specificity": 0.7, "ppv": 0.3, "npv": 0.9, "ppv_at": 0.15,
             "npv_at": None, "intervals": {"sensitivity": [0.7, 0.88]}}  # fmt: skip
    said |= {
        "calibration": {"temperature": 1.25, "fitted_on": "val", "test": {"ece": 0.061}, "test_scaled": {"ece": 0.02}},
        "operating_points": {EVIL[0]: {"youden": point}},
        "controls": {"source_only": {"n": 36, "accuracy": 0.44, "balanced_accuracy": None, "auc_macro": 0.61}},
    }
    page = Page(report_page.page(CONFIG, said, {}, workdir / "plots", summary(), ABOUT))
    level = said["test"]["slice"]
    results = {row[0]: row[1:] for row in page.table("", "test, per slice")}
    assert results["accuracy"][0] == f"{level['accuracy']:.3f} 0.123 to 0.568"
    assert results["accuracy"][2] == f"{said['val']['slice']['accuracy']:.3f}"
    assert results["examples"] == ["36", "18", "36", "18"]
    classes = next(t for t in page.tables if t[0][0] == "class against the rest")
    recall = classes[2][2 + metrics.PER_CLASS.index("recall")]
    assert recall == f"{level['per_class'][EVIL[1]]['recall']:.3f} 0.200 to 0.900"
    points = page.table("class", "chosen for")
    assert points[0][-2:] == ["PPV, at 10 % prevalence", "NPV, at 10 % prevalence"]
    assert points[1] == [EVIL[0], "youden", "0.400", "0.810 0.700 to 0.880", "0.700", "0.300", "0.900", "0.150", "-"]
    scaled = page.table("test probabilities")
    assert [row[:2] for row in scaled[1:]] == [["as they are", "0.061"], ["after temperature 1.250", "0.020"]]
    assert ["no network: the source of the image alone", "36", "0.440", "-", "0.610"] in page.table("", "n")
    card = page.text[page.text.index("Headings of Mitchell") :]
    assert "an AUC of 0.610 from the source alone" in card and "95 % intervals" in card


def test_what_is_known_of_the_data_is_told(run):
    page = Page((run[0] / "report.html").read_text("utf-8"))
    assert page.table("protocol, split")[1] == ["clean, test", "20", "1", "2", "3", "5"]
    assert "In this run's protocol 5 test images are known from train" in page.text
    assert "Of 20 test images 5 are known from train" in page.text
    clean = Page(report_page.page(CONFIG, report_of(run), {}, run[0] / "plots", summary(leaks=0)))
    assert "None in this run's protocol." in clean.text and "not known to this page" in clean.text
    assert page.table("source", EVIL[0])[1:] == [["here<i>", "9", "0", "0"], ["(none)", "0", "8", "0"]]
    settings = {row[0]: row[1] for table in page.tables for row in table if len(row) == 2}
    assert settings["optim.lr"] == "0.0125" and "optim.b1" not in settings
    assert settings["jax"] == "0.10.2" and settings["patients"] == "33"
    assert "Data licence: CC BY 4.0" in page.text


def test_other_splits_than_the_data_sets_own_are_said(run):
    said = report_of(run)
    elsewhere = said | {"facts": FACTS | {"external": {"trained_on": "ct_cov19", "split": "test"}}}
    page = Page(report_page.page(CONFIG, elsewhere, {}, run[0] / "plots", summary(), ABOUT))
    assert "trained on ct_cov19 (" in page.text and "not the data set of the training images" in page.text
    parted = replace(CONFIG, data=replace(CONFIG.data, folds=5, fold=2))
    folds = Page(report_page.page(parted, said, {}, run[0] / "plots", summary(), ABOUT))
    assert "part 2 of 5 (from 0) is test" in folds.text and "A part of a cross-validation by patient" in folds.text
    for other in (page, folds):
        assert "known from train (copy" not in other.text and "In this run's protocol" not in other.text


def report_of(run):
    return json.loads((run[0] / "report.json").read_text())


def test_a_report_of_an_older_lungjax_still_makes_a_page(run):
    """Without intervals, calibration, operating points, controls, mistakes, validation, sources and facts."""
    old = report_of(run)
    for key in ("mistakes", "val", "calibration", "operating_points", "controls"):
        old.pop(key, None)
    old["facts"], old["test"]["by_source"] = {}, {}
    for level in (old["test"]["slice"], old["test"]["patient"]):
        for key in ("ece", "brier", "intervals", "study"):
            level.pop(key, None)
    page = Page(report_page.page(Config(), old, {}, run[0] / "plots"))
    heads = [unescape(words) for words in report_page.SECTIONS.values()]
    assert all(f" {words} " in page.text for words in heads)
    assert "Calibration" not in page.text and "Operating" not in page.text and "bootstrap" not in page.text
    old["no_lungs"] = old["test"]["slice"]
    page = Page(report_page.page(Config(), old, {}, run[0] / "plots"))
    assert any(row[0] == "the network, lungs blacked out" for row in page.table("", "n"))


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<svg>" * 9)
    with pytest.raises(ValueError, match=r"a\.png is not a PNG"):
        html.embedded(tmp_path / "a.png", "caption")


def test_tables_take_markup_of_lungjax_only():
    text = html.table(["a"], [["<b>"], [html.Markup("<b>x</b>")], [1234], [True]])
    assert re.findall("<td>(.*?)</td>", text) == ["&lt;b&gt;", "<b>x</b>", "1,234", "True"]


def test_no_text_of_the_mistakes_lies_on_another(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(style, "save", lambda figure, path: kept.append(figure))
    long = tuple(f"{name} {'wide and long ' * 5}" for name in "ABC")
    test = replace(make(), classes=long, ids=np.array([f"{'folder-' * 12}{i}" for i in range(36)]))
    images = np.zeros((3, 8, 8, 1), np.uint8)
    plots.mistakes(test, plots.choose_examples(test, 3)[1], images, images[..., 0], tmp_path / "m.png")
    FigureCanvasAgg(kept[0]).draw()
    boxes = [text.get_window_extent() for text in kept[0].texts]
    boxes += [axis.get_window_extent() for axis in kept[0].axes]
    assert len(boxes) == 3 * 3 + 3 * 2
    for a, b in itertools.combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2
    assert max(box.x1 for box in boxes) <= kept[0].bbox.x1 and min(box.y0 for box in boxes) >= 0
