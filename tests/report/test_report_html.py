"""report.html is valid and self-contained, and escapes names; its numbers and figures are those of the run."""

import base64
import io
import json
from dataclasses import replace

import html5lib
import numpy as np
import pytest
from PIL import Image
from random_predictions import guesses

from lungjax.config import Config, EvalConfig, ModelConfig, OptimConfig
from lungjax.evaluation import metrics
from lungjax.report import context, plots, style, templating, write

EVIL = ('<script>alert("x")</script>', "a & b's | c", "NonCOVID")
CONFIG = Config(
    name="small</title>", model=ModelConfig(name="cbr_tiny"), optim=OptimConfig(lr=0.0125),
    eval=EvalConfig(examples=3, prevalence=(f"{EVIL[0]}:0.1",), draws=0),
)  # fmt: skip
FACTS = {
    "heat_maps": "HEAT",
    "dataset": "folder/mine", "counts": {"train": dict(zip(EVIL, (50, 40, 30), strict=True))}, "steps": 60,
    "versions": {"lungjax": "0.1.0", "jax": "0.10.2"},
}  # fmt: skip
ABOUT = {
    "title": "slices", "licence": "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).",
    "citation": "A <b> et al.", "clean": "by patient",
}  # fmt: skip


def make(seed=0):
    p = guesses(np.arange(36) // 2 % 3, EVIL, seed, 0.0, slices=2, sources=("here<i>", "there"))
    return replace(p, ids=np.array([f'"><img src=x onerror=alert({i})>\x1b[2J.png' for i in range(36)]))


def image(row):
    return np.full((8, 8, 1), 7 * row % 256, np.uint8)


def summary(leaks=5):
    counts = {"images": dict.fromkeys(EVIL, 11), "groups": dict.fromkeys(EVIL, 4)}
    leak = {"images": 20, "exact_twin_in_train": 1, "near_twin_in_train": 2, "group_in_train": 3, "any": leaks}
    return {
        "images": 99, "classes": list(EVIL), "group_name": "patients", "groups": 33, "stage": "", "size": None,
        "protocols": {"clean": {"train": counts, "val": counts, "test": counts}},
        "sources": {"here<i>": {EVIL[0]: 9}, "": {EVIL[1]: 8}},
        "sizes": {"width": [10, 20, 30], "height": [11, 21, 31], "common": [["10 x 11", 1234]]},
        "pixels": {"mean": 0.5, "std": 0.25},
        "duplicates": {"sets": 1, "images": 2, "sets_with_several_labels": 0},
        "twins": {"near_pairs": 6, "left_out": 7, "leaks": {"clean": {"test": leak}}},
        "groups_with_several_labels": 0, "skipped": ["<x>.png: broken"] * 25, "unstaged": [],
        "notes": ["a note & more"], "warnings": ["a <warning>"],
    }  # fmt: skip


class Page:
    """Collects tags, text and tables of a page; raises an error for invalid HTML."""

    def __init__(self, text):
        root = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
        for style_sheet in root.iter("style"):
            style_sheet.text = ""
        for small in root.iter("small"):
            small.text = f" {small.text}"
        self.tags = [(each.tag, each.attrib) for each in root.iter()]
        self.text = " ".join("".join(root.itertext()).split())
        self.tables = [
            [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] for table in root.iter("table")
        ]

    def table(self, *head):
        """Returns the only table whose first row starts with `head`."""
        (match,) = [table for table in self.tables if table and tuple(table[0][: len(head)]) == head]
        assert len({len(row) for row in match}) == 1, "ragged rows"
        return match

    def facts(self):
        """Returns the rows of two-column tables."""
        return {row[0]: row[1] for table in self.tables for row in table if len(row) == 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, and the arguments of its calls to `explain`."""
    workdir, calls = tmp_path_factory.mktemp("page"), []

    def explain(images, targets):
        calls.append((images, targets))
        return np.tile(np.linspace(0, 1, 8, dtype=np.float32), (len(images), 8, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)
        results = {"test": make(), "val": make(1)}
        write.write_report(workdir, CONFIG, results, [], FACTS, image, explain, summary(), ABOUT)
    return workdir, calls


@pytest.fixture(scope="module")
def page(run):
    return Page((run[0] / "report.html").read_text("utf-8"))


@pytest.fixture
def saved(run):
    return json.loads((run[0] / "report.json").read_text())


def render_page(run, report, config=CONFIG, *details):
    """Returns the page of a modified report, without figures."""
    return Page(templating.render("report.html.j2", **context.build(config, report, {}, run[0] / "plots", *details)))


def test_self_contained_page(run, page):
    assert not {tag for tag, _ in page.tags} & {"script", "i", "link", "iframe", "object", "form", "base"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert sorted(link[1:] for link in links if link.startswith("#")) == sorted(ids) == sorted(context.SECTIONS)
    assert all(link.startswith(("#", "https://")) for link in links)
    assert "https://creativecommons.org/licenses/by/4.0/" in links  # without the bracket and period after it
    text = (run[0] / "report.html").read_text("utf-8")
    assert "url(" not in text and "@import" not in text
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:")
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_embedded_figures(run, page):
    assert "Heat maps: HEAT." in page.text
    embedded = []
    for attrs in [attrs for tag, attrs in page.tags if tag == "img"]:
        kind, _, data = attrs["src"].partition(",")
        assert kind == "data:image/png;base64" and attrs["alt"]
        embedded.append(base64.b64decode(data, validate=True))
        with Image.open(io.BytesIO(embedded[-1])) as picture:
            assert (attrs["width"], attrs["height"]) == tuple(map(str, picture.size))
    files = {path.name: path.read_bytes() for path in (run[0] / "plots").iterdir()}
    assert "mistakes.png" in files and sorted(embedded) == sorted(files.values())


def test_escaping_of_names(run, page):
    confusion = next(table for table in page.tables if table[0][0] == "true / predicted")
    assert [row[0] for row in confusion[1:]] == list(EVIL) and confusion[0][1:] == list(EVIL)
    assert page.text.startswith("small</title>: cbr_tiny on folder/mine")
    assert "<x>.png: broken" in page.text and "lists 5 more" in page.text and "a <warning>" in page.text
    assert page.table("image (test)")[1][0].startswith('"><img src=x') and "\ufffd[2J.png" in page.text
    assert templating.escape_html("a\x00b\tc\n") == "a\ufffdb\tc\n"
    text = (run[0] / "report.md").read_text("utf-8")
    assert "\x1b" not in text and "<img" not in text.replace("\\<img", "") and "a \\& b's \\| c" in text
    assert templating.escape_markdown("a|*b*\n[c](d) `e` <f> $g$") == r"a\|\*b\* \[c\](d) \`e\` \<f> \$g\$"


def test_mistakes(run, page, saved):
    _, calls = run
    test = make()
    wrong = [shown.row for shown in plots.choose_examples(test, 3)[1]]
    ((images, targets),) = calls
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    assert images[:, 0, 0, 0].tolist() == [7 * row % 256 for row in wrong]
    assert targets.tolist() == test.predicted[wrong].tolist()
    assert [each["id"] for each in saved["mistakes"]] == test.ids[wrong].tolist()
    cells = [[EVIL[test.labels[i]], EVIL[test.predicted[i]], f"{test.probabilities[i].max():.3f}"] for i in wrong]
    assert [row[1:] for row in page.table("image (test)")[1:]] == cells


def test_ct_slices_and_other_images(run, page, saved):
    slices = render_page(run, saved | {"unit": "slice"}, CONFIG, summary())
    for noun, here, other in (("image", page, "per slice"), ("slice", slices, "per image")):
        words = (f"Tested on 36 {noun}s of 18 patients", f"Confusion, per {noun} (test)", f"On 36 test {noun}s")
        assert all(word in here.text for word in words) and other not in here.text
    assert "ROC curves, test images." in page.text


def test_numbers_and_intervals(run, saved):
    for unit in ("slice", "patient"):
        saved["test"][unit]["intervals"] = {"accuracy": [0.1234, 0.5678], f"per_class.{EVIL[1]}.recall": [0.2, 0.9]}
    level = {"n": 36, "accuracy": 0.44, "balanced_accuracy": None, "auc_macro": 0.61}
    page = render_page(run, saved | {"controls": {"source_only": level}})
    level = saved["test"]["slice"]
    results = {row[0]: row[1:] for row in page.table("", "test, per image")}
    assert results["accuracy"][0] == f"{level['accuracy']:.3f} 0.123 to 0.568"
    classes = next(t for t in page.tables if t[0][0] == "class against the rest")
    recall = classes[2][2 + metrics.PER_CLASS.index("recall")]
    assert recall == f"{level['per_class'][EVIL[1]]['recall']:.3f} 0.200 to 0.900"
    points = [table for table in page.tables if table[0][:2] == ["class", "chosen for"]]
    assert len(points) == 2 and points[0][0][-2:] == ["PPV, at prevalence", "NPV, at prevalence"]
    assert ["source of the image alone, no network", "36", "0.440", "-", "0.610"] in page.table("", "n")
    card = page.text[page.text.index("The headings are those of Mitchell") :]
    assert "0.610 from the source alone" in card and "95 % intervals" in card


def test_caveats_are_listed_once(page, saved):
    assert saved["warnings"] and all(page.text.count(" ".join(text.split())) == 1 for text in saved["warnings"])


def test_data_section(run, page, saved):
    assert page.table("protocol, split")[1] == ["clean, test", "20", "1", "2", "3", "5"]
    assert "In this run's protocol 5 test images have a counterpart in train" in page.text
    assert "5 of 20 test images have a counterpart in train" in page.text
    clean = render_page(run, saved, CONFIG, summary(leaks=0))
    assert "None in this run's protocol." in clean.text and "Data license: not recorded" in clean.text
    assert page.table("source", EVIL[0])[1:] == [["here<i>", "9", "0", "0"], ["(none)", "0", "8", "0"]]
    facts = page.facts()
    assert facts["optim.lr"] == "0.0125" and "optim.b1" not in facts
    assert facts["jax"] == "0.10.2" and facts["patients"] == "33"
    assert "Data license: CC BY 4.0" in page.text


def test_other_splits(run, saved):
    external = saved | {"facts": FACTS | {"external": {"trained_on": "ct_cov19", "split": "test"}}}
    page = render_page(run, external, CONFIG, summary(), ABOUT)
    assert "trained on ct_cov19 (" in page.text and "not the data set of the training images" in page.text
    config = replace(CONFIG, data=replace(CONFIG.data, folds=5, fold=2))
    folds = render_page(run, saved, config, summary(), ABOUT)
    assert "fold 2 (counted from 0) is the test split" in folds.text and "One fold of a cross-validation" in folds.text
    assert "have a counterpart in train" not in page.text + folds.text
