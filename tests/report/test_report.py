import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lungjax.config import Config, EvalConfig, TrainConfig
from lungjax.evaluation import bootstrap, calibration, metrics, operating_points, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import markdown, plots, plots_decisions, style, write

CLASSES = ("Normal", "Pneumonia", "COVID-19")
LONG = (
    *("Normal", "Community acquired pneumonia (bacterial)" * 4, "COVID-19", "a $x^$ | _b_", "Tuberculosis"),
    *(
        "Viral pneumonia, other than COVID-19",
        "Emphysema",
        "Fibrosis",
        "Oedema",
        "Lung cancer, adenocarcinoma",
    ),
)
CONFIG = Config(
    name="small", train=TrainConfig(monitor="slice.auc_macro"), eval=EvalConfig(examples=3, draws=40, prevalence=0.02)
)
FACTS = {
    "dataset": "folder/my_hospital",
    "fingerprint": "ab" * 32,
    "counts": {"train": {"Normal": 1234, "Pneumonia": 30, "COVID-19": 40}},
    "parameters": np.int64(2108672),
    "steps": 60,
    "best_step": np.int64(40),
    "seconds": 3725.0,
    "versions": {"jax": "0.10.2"},
}
HISTORY = [
    {"step": 20, "epoch": 1.0, "train.loss": 1.0, "lr": 1e-3, "images_per_s": 9.0},
    {"step": 20, "epoch": 1.0, "val.slice.loss": 0.9, "val.slice.auc_macro": None},
    {"step": 40, "epoch": 2.0, "train.loss": 0.5, "lr": 1e-3, "images_per_s": 9.0},
    {"step": 40, "epoch": 2.0, "val.slice.loss": 0.6, "val.slice.auc_macro": 0.8125},
    {"step": 60, "epoch": 3.0, "train.loss": 0.4, "lr": 1e-3, "images_per_s": 9.0},
    {"step": 60, "epoch": 3.0, "val.slice.loss": 0.7, "val.slice.auc_macro": 0.75},
]


def make(seed=0, n=120, classes=CLASSES, tag="t", slices=3, sources=("mosmed", "radio.paedia.org")):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // slices % len(classes)
    logits = rng.normal(size=(n, len(classes)))
    logits[np.arange(n), labels] += 1.5
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(
        ids=np.array([f"{tag}_{i:03}.png" for i in range(n)]),
        groups=np.array([f"{tag}{i // slices}" for i in range(n)]),
        sources=rng.choice(np.array(sources), n),
        labels=labels,
        probabilities=p.astype(np.float32),
        classes=classes,
    )


def changed(p: Predictions, **fields) -> Predictions:
    return Predictions(**({name: getattr(p, name) for name in p.__dataclass_fields__} | fields))


def image(row: int) -> np.ndarray:
    return np.full((20, 30, 1), row % 256, np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with a report, and what was predicted."""
    workdir = tmp_path_factory.mktemp("run")
    results = {"val": make(1, 60, tag="v"), "test": make()}
    write.write_report(workdir, CONFIG, results, HISTORY, FACTS, image)
    return workdir, results


def test_the_numbers_stand_under_their_documented_names(run):
    workdir, results = run
    saved = json.loads((workdir / "report.json").read_text())
    assert saved["version"] == 1 and saved["classes"] == list(CLASSES)
    for split, p in results.items():
        held = {**saved[split], **saved[split]["by_source"]}
        for level in [held.pop("slice"), held.pop("patient"), *saved[split]["by_source"].values()]:
            assert level.pop("intervals").keys() <= metrics.numbers(level).keys()
        assert saved[split] == json.loads(json.dumps(metrics.report_levels(p)))
    saved = json.loads((workdir / "report.json").read_text())
    test = results["test"]
    for unit in ("slice", "patient"):
        for name, ends in bootstrap.intervals(test, 40, unit=unit).items():
            assert write.lookup(saved, f"test.{unit}.intervals")[name] == list(ends)
    mosmed = bootstrap.take(test, np.flatnonzero(test.sources == "mosmed"))
    assert write.lookup(saved, "test.by_source.mosmed.intervals")["accuracy"] == list(
        bootstrap.intervals(mosmed, 40)["accuracy"]
    )
    at_mosmed = test.sources == "mosmed"
    hits = test.probabilities.argmax(axis=1) == test.labels
    assert write.lookup(saved, "test.slice.accuracy") == pytest.approx(hits.mean())
    assert write.lookup(saved, "test.by_source.mosmed.accuracy") == pytest.approx(hits[at_mosmed].mean())
    assert write.lookup(saved, "test.by_source.radio.paedia.org.n") == (~at_mosmed).sum()
    assert np.sum(write.lookup(saved, "test.slice.confusion")) == 120
    assert write.lookup(saved, "test.patient.n") == 40
    assert saved["best"] == {"step": 40, "monitor": "slice.auc_macro", "score": 0.8125}
    assert saved["facts"]["parameters"] == 2108672

    # Every key of a level is in the docstring, and the other way round.
    text = write.__doc__.split("A level")[1].split("So `lookup")[0]
    documented = set(re.findall(r"\b[a-z]\w+\b|\bn\b", text.split("None means in `lungjax.evaluation.metrics`:")[1]))
    level = saved["test"]["slice"]
    known = {*level, *level["per_class"]["Normal"], *level["study"]}
    assert known <= documented
    words = """lists of counts row true class as the studies define them low high by bootstrap over patients lungjax
    being such or without what has none source only up to sources evaluation"""
    assert documented - known <= set(words.split())


def test_calibration_and_operating_points_are_chosen_on_val(run):
    workdir, results = run
    saved = json.loads((workdir / "report.json").read_text())
    val, test = results["val"], results["test"]
    assert saved["calibration"] == calibration.summary(val, test)
    assert saved["operating_points"] == operating_points.points(val, test, 0.95, 0.02, draws=40)
    point = write.lookup(saved, "operating_points.COVID-19.youden")
    assert point["threshold"] == operating_points.choose(val, 2, "youden") and point["tp"] + point["fn"] == 39
    text = (workdir / "report.md").read_text()
    found = {tuple(row[:2]): row[2:] for table in tables(text) for row in table}
    low, high = point["intervals"]["npv_at"]
    assert found["COVID-19", "youden"][0] == f"{point['threshold']:.3g}"
    assert found["COVID-19", "youden"][-1] == f"{point['npv_at']:.3f} ({low:.3f} to {high:.3f})"
    assert "NPV, at 2 % prevalence" in text and found["COVID-19", "sensitivity 0.95"]
    assert f"after temperature {saved['calibration']['temperature']:.3f}" in text
    alone = write.assemble(CONFIG, {"test": test}, HISTORY, FACTS)
    assert not {"calibration", "operating_points"} & alone.keys()
    assert "Calibration" not in markdown.markdown(CONFIG, alone, {})


def test_controls_have_intervals_and_without_draws_there_are_none():
    test = make()
    source = changed(test, probabilities=np.tile(np.float32([0.2, 0.3, 0.5]), (120, 1)))
    found = write.assemble(CONFIG, {"test": test, "source_only": source, "no_lungs": test}, HISTORY, FACTS)
    assert found["controls"]["source_only"]["intervals"]["auc_macro"] == [0.5, 0.5]
    assert found["controls"]["no_lungs"]["auc_macro"] == found["test"]["slice"]["auc_macro"]
    assert found["no_lungs"]["intervals"] == found["test"]["slice"]["intervals"]
    assert "AUC 0.500 (0.500 to 0.500)" in markdown.markdown(CONFIG, found, {})
    config = dataclasses.replace(CONFIG, eval=EvalConfig(draws=0))
    bare = write.assemble(config, {"test": test, "val": make(1, tag="v")}, HISTORY, FACTS)
    assert bare["test"]["slice"]["intervals"] == bare["operating_points"]["Normal"]["youden"]["intervals"] == {}
    assert " to " not in markdown.markdown(config, bare, {}).split("## Results")[1].split("A dash")[0]


def test_lookup_names_the_nearest():
    part = {
        "slice": {"auc_macro": 0.5, "accuracy": 1.0, "confusion": [[1]]},
        "a": {"b.c": {"d": 3}, "b": {"e": 4}},
    }
    assert write.lookup(part, "a.b.c.d") == 3 and write.lookup(part, "a.b.e") == 4
    with pytest.raises(ValueError, match=r"no 'slice.auc'.*slice\.auc_macro"):
        write.lookup(part, "slice.auc")
    with pytest.raises(ValueError, match=r"no 'slice\.accuracy\.x'"):
        write.lookup(part, "slice.accuracy.x")


def test_predictions_and_pictures_lie_beside_the_page(run):
    workdir, results = run
    for split, p in results.items():
        saved = predictions.read(workdir / f"predictions_{split}.csv")
        np.testing.assert_array_equal(saved.probabilities, p.probabilities)
    text = (workdir / "report.md").read_text()
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert sorted(linked) == sorted(f"plots/{path.name}" for path in (workdir / "plots").iterdir())
    assert len(linked) == 8
    for name in linked:
        with Image.open(workdir / name) as picture:
            pixels = np.asarray(picture.convert("L"))
            assert min(picture.size) > 200 and (pixels < 128).mean() > 0.002, name
            # Nothing is cut: the outermost pixels are white.
            assert min(pixels[[0, -1]].min(), pixels[:, [0, -1]].min()) == 255, name
    assert not list(workdir.rglob(".partial*"))


def tables(text: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE)
    split = re.compile(r"(?<!\\)\|")
    return [[[c.strip() for c in split.split(row)[1:-1]] for row in b.splitlines()] for b in blocks]


def test_the_page_says_what_the_numbers_say(run):
    workdir, _ = run
    saved = json.loads((workdir / "report.json").read_text())
    text = (workdir / "report.md").read_text()
    assert "Not for clinical use" in text
    found = tables(text)
    assert all(len({len(row) for row in table}) == 1 for table in found), "a table with ragged rows"
    cells = {row[0]: row[1:] for table in found for row in table}
    columns = [saved[split][level] for split in ("test", "val") for level in ("slice", "patient")]
    for name, words in (("accuracy", "accuracy"), ("auc_macro", "AUC, mean over classes"), ("ece", "expected")):
        wanted = [(level[name], *level["intervals"][name]) for level in columns]
        shown = next(values for key, values in cells.items() if key.startswith(words))
        assert shown == [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in wanted]
    confusion = [row[1:] for row in found[2][2:]]
    assert confusion == [[str(n) for n in row] for row in saved["test"]["slice"]["confusion"]]
    mosmed = saved["test"]["by_source"]["mosmed"]
    assert cells["mosmed"][0] == str(mosmed["n"]) and cells["mosmed"][-1].startswith(f"{mosmed['auc_macro']:.3f} (")
    assert cells["train"] == ["1,234", "30", "40", "1,304"]
    assert "step 40 of 60" in cells["tested weights"][0] and "0.8125" in cells["tested weights"][0]
    assert cells["time, last start to end"] == ["1 h 2 min"]
    assert "eval.examples=3" in cells["fields that differ from the defaults"][0]


def warned(test: Predictions, val: Predictions | None = None, history=HISTORY, config=CONFIG, **facts) -> str:
    results = {"test": test} if val is None else {"test": test, "val": val}
    found = write.assemble(config, results, history, FACTS | facts)
    assert not found["warnings"] or all(
        markdown._cell(line) in markdown.markdown(CONFIG, found, {}) for line in found["warnings"]
    )
    return "\n".join(found["warnings"])


def test_nothing_is_warned_about_without_cause():
    assert warned(make(), make(1, tag="v")) == ""


def test_what_to_know_before_believing_is_said():
    p = make()
    where = np.flatnonzero(p.labels < 2)
    two = Predictions(*(getattr(p, f)[where] for f in ("ids", "groups", "sources", "labels", "probabilities")), CLASSES)
    assert "test split has no example of COVID-19" in warned(two)
    assert "few examples of Normal (15), Pneumonia (15) and COVID-19 (15)" in warned(make(n=45))
    mixed = changed(p, groups=np.where(p.groups == "t1", "t0", p.groups))
    assert "test numbers per patient leave out 1 patient with" in warned(mixed)
    never = p.probabilities.copy()
    never[:, 2] = 0
    never /= never.sum(axis=1, keepdims=True)
    assert "COVID-19 is never predicted" in warned(changed(p, probabilities=never))
    constant = changed(p, probabilities=np.tile(np.float32([0.5, 0.3, 0.2]), (120, 1)))
    assert "accuracy of 0.350 is no better than always naming the most frequent class (0.350)" in warned(constant)
    assert "No two test images share a patient" in warned(changed(p, groups=p.ids))
    assert "of 6 patients: intervals from so few" in warned(make(n=18))
    lacking = warned(p, changed(make(1, tag="v"), labels=np.arange(120) // 3 % 2))
    assert "no operating point for COVID-19" in lacking
    shared = changed(make(1, tag="v"), groups=np.array(["t7"] + [f"v{i // 3}" for i in range(1, 120)]))
    assert "share 1 patient, such as t7" in warned(p, shared)
    tied = warned(changed(p, sources=np.where(p.labels == 2, "mosmed", "cncb")))
    assert "one class only: mosmed (COVID-19)." in tied
    assert "All test examples of COVID-19 come from one source, mosmed." in tied
    assert "All test examples of Normal come from one source, cncb." in tied
    last = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, keep="last"))
    assert "longer training" not in warned(p, config=last, best_step=60), "the last weights always end the run"
    assert "longer training" in warned(p, best_step=60) and "longer training" not in warned(p, best_step=40)


def test_a_bare_run_can_be_reported(tmp_path):
    """One class without examples, a patient an image, no sources, no history, no facts, no validation."""
    ids = np.array(["only.png"])
    p = Predictions(ids, ids, np.array([""]), np.array([1]), np.array([[0.2, 0.8]]), ("a|b", "c"))
    write.write_report(tmp_path, Config(), {"test": p}, [], {}, image)
    text = (tmp_path / "report.md").read_text()
    assert r"| a\|b | 0 | - | - | 1.000 |" in text
    assert all(len({len(row) for row in table}) == 1 for table in tables(text))
    assert not (tmp_path / "plots" / "confusion_patient.png").exists()
    with pytest.raises(ValueError, match="no predictions of the test split"):
        write.write_report(tmp_path, Config(), {"val": p}, [], {}, image)


def test_a_report_that_fails_leaves_the_earlier_one(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    p = make(5)
    p.probabilities[0] = np.nan
    with pytest.raises(ValueError, match=r"t_000\.png"):
        write.write_report(workdir, CONFIG, {"test": p}, HISTORY, FACTS, image)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_examples_take_turns_and_begin_with_the_surest_mistakes():
    p = make(n=300)
    right, wrong = plots.choose_examples(p, 6)
    assert (right, wrong) == plots.choose_examples(p, 6)
    said = p.predicted
    assert all(said[row] == p.labels[row] for row in right) and len(set(right)) == 6
    assert all(said[row] != p.labels[row] for row in wrong) and len(set(wrong)) == 6
    assert p.labels[right].tolist() == p.labels[wrong].tolist() == [0, 1, 2, 0, 1, 2]
    sure = p.probabilities.max(axis=1)
    for label in range(3):
        missed = np.flatnonzero((p.labels == label) & (said != label))
        assert wrong[label] == missed[sure[missed].argmax()]
    # Of one patient's mistakes only the surest, as long as there are other patients.
    one = changed(p, groups=np.where(p.labels == 0, "same", p.groups))
    _, wrong = plots.choose_examples(changed(one, labels=np.zeros(300, int)), 100)
    groups = one.groups[wrong].tolist()
    first_again = next(i for i, g in enumerate(groups) if g in groups[:i])
    assert set(groups[:first_again]) == set(groups)
    # Right ones are spread over the rows.
    perfect = changed(p, probabilities=np.eye(3, dtype=np.float32)[p.labels])
    right, wrong = plots.choose_examples(perfect, 12)
    assert wrong == [] and len(right) == 12
    for label in range(3):
        rows = sorted(row for row in right if p.labels[row] == label)
        assert len(rows) == 4 and rows[0] < 75 and rows[-1] > 200 and max(np.diff(rows)) < 150


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws and keeps each picture's figure, for a look at what is where."""
    kept = []
    save = style.save

    def keep(figure, path):
        save(figure, path)
        kept.append(figure)

    monkeypatch.setattr(style, "save", keep)
    return kept


def texts_of(figure):
    """The straight texts that are shown, with their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()  # which puts every text in its place
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent()) for t in shown if t.get_rotation() in (0, 90)]


@pytest.mark.parametrize("c", [3, 10])
def test_no_text_lies_on_another_with_few_or_many_long_names(drawn, tmp_path, c):
    p = make(n=40 * c, classes=LONG[:c])
    matrix = metrics.summarize(p.labels, p.probabilities, p.classes)["confusion"]
    plots.confusion((np.asarray(matrix) * 1000).tolist(), p.classes, tmp_path / "c.png", "Confusion, test")
    plots.roc_curves(p.labels, p.probabilities, p.classes, tmp_path / "roc.png")
    plots.pr_curves(p.labels, p.probabilities, p.classes, tmp_path / "pr.png")
    plots.example_sheet(
        changed(p, ids=np.array([f"{'long-' * 12}{i}" for i in range(40 * c)])), image, 12, tmp_path / "e.png"
    )
    assert len(drawn) == 4
    for name in ("roc.png", "pr.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width < 1300, "a long name widens the legend"
    for figure in drawn:
        assert figure.get_figwidth() < 20
        for (a, box_a), (b, box_b) in itertools.combinations(texts_of(figure), 2):
            width = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
            height = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
            assert width < 2 or height < 2, f"{a!r} on {b!r}"


def test_confusion_shows_counts_and_shares(drawn, tmp_path):
    plots.confusion([[3, 1], [0, 0]], ("a", "b"), tmp_path / "c.png", "title")
    left, right = drawn[0].axes
    assert [t.get_text() for t in left.texts] == ["3", "1", "0", "0"]
    assert [t.get_text() for t in right.texts] == ["75%", "25%"], "a class without examples has no shares"
    plots.confusion([[999, 1], [1, 999]], ("a", "b"), tmp_path / "c.png", "title")
    assert [t.get_text() for t in drawn[1].axes[1].texts] == [">99%", "<1%", "<1%", ">99%"]


def test_curves_are_those_of_the_metrics(drawn, tmp_path):
    p = make()
    labels = np.where(p.labels == 2, 1, p.labels)  # COVID-19 has no example
    plots.roc_curves(labels, p.probabilities, CLASSES, tmp_path / "roc.png")
    plots.pr_curves(labels, p.probabilities, CLASSES, tmp_path / "pr.png")
    for figure, curve, area in zip(
        drawn, (metrics.roc_curve, metrics.pr_curve), (metrics.auc, metrics.average_precision), strict=True
    ):
        lines = {line.get_label().split("\n")[0]: line for line in figure.axes[0].lines}
        for i in (0, 1):
            x, y, _ = curve(labels == i, p.probabilities[:, i].astype(np.float64))
            np.testing.assert_array_equal(lines[CLASSES[i]].get_xdata(), x)
            np.testing.assert_array_equal(lines[CLASSES[i]].get_ydata(), y)
            assert f"{area(labels == i, p.probabilities[:, i]):.3f}" in lines[CLASSES[i]].get_label()
        assert re.search("no A(UC|P)$", lines["COVID-19"].get_label())
        assert "all pooled (micro)" in lines


def test_reliability_and_decision_curves_show_their_numbers(drawn, tmp_path):
    p = make(n=40 * 5, classes=LONG[:5])
    bins = calibration.bins(p)
    scaled = calibration.bins(calibration.apply_temperature(p, 2.0))
    plots_decisions.reliability(bins, scaled, tmp_path / "r.png")
    upper, lower = drawn[0].axes
    for line, found in zip(upper.lines[1:], (bins, scaled), strict=True):
        assert line.get_xydata().tolist() == [[b["confidence"], b["accuracy"]] for b in found if b["n"]]
    assert [bar.get_height() for bar in lower.patches] == [b["n"] for found in (bins, scaled) for b in found]
    plots_decisions.decision_curves(p, tmp_path / "d.png")
    plots_decisions.decision_curves(make(), tmp_path / "d.png")
    for figure, many in ((drawn[1], p), (drawn[2], make())):
        shown = [axis for axis in figure.axes if axis.get_visible()]
        assert len(shown) == len(many.classes)
        for i, axis in enumerate(shown):
            curve = operating_points.net_benefit(many, i)
            lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
            assert lines["the network"] == curve["model"] and lines["call all"] == curve["all"]
    for figure in drawn:
        # The numbers at ticks beyond an axis's end are texts too, though nobody sees them.
        texts = [(text, box) for text, box in texts_of(figure) if not re.fullmatch("[\u2212\\d.]+", text)]
        assert len(texts) > 5
        for (a, box_a), (b, box_b) in itertools.combinations(texts, 2):
            assert not box_a.overlaps(box_b), f"{a!r} on {b!r}"


def test_training_curves_show_what_was_logged(drawn, tmp_path):
    plots.training_curves(HISTORY, tmp_path / "t.png", "slice.auc_macro", 40)
    loss, monitor, lr = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines["train"] == [[20, 1.0], [40, 0.5], [60, 0.4]]
    assert lines["validation"] == [[20, 0.9], [40, 0.6], [60, 0.7]]
    assert monitor.lines[0].get_xydata().tolist() == [[40, 0.8125], [60, 0.75]], "None has no point"
    assert lr.lines[0].get_ydata().tolist() == [1e-3] * 3
    assert {line.get_xdata()[0] for axis in drawn[0].axes for line in axis.lines[-1:]} == {40}
    plots.training_curves(HISTORY, tmp_path / "t.png", "slice.loss")
    assert len(drawn[1].axes) == 2
    long = [{"step": s, "train.loss": float(s % 2)} for s in range(1, 201)]
    plots.training_curves(long, tmp_path / "t.png", "slice.loss")
    noisy, smooth = drawn[2].axes[0].lines
    assert len(noisy.get_xdata()) == len(smooth.get_xdata()) == 200
    assert np.ptp(smooth.get_ydata()[5:-5]) < 0.2 and np.ptp(noisy.get_ydata()) == 1


def test_importing_costs_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    code = (
        "import sys; from lungjax.report import plots, write; assert 'matplotlib' not in sys.modules; "
        f"from pathlib import Path; path = Path({str(tmp_path)!r}) / 'c.png'; "
        "plots.confusion([[1, 0], [0, 1]], 'ab', path, 'title'); "
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
