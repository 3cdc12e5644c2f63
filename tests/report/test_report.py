"""Numbers, warnings and figures of report.json and report.md."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import without_pictures
from PIL import Image
from random_predictions import guesses, random_findings
from sklearn import metrics as sk

from lungjax.config import Config, EvalConfig, TrainConfig
from lungjax.data import summary
from lungjax.data.prepared import Prepared
from lungjax.evaluation import bootstrap, calibration, metrics, operating_points, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import context, plots, style, write
from lungjax.report.templating import Number

CLASSES = ("Normal", "Pneumonia", "COVID-19")
CONFIG = Config(
    name="small",
    train=TrainConfig(monitor="slice.auc_macro"),
    eval=EvalConfig(examples=3, draws=40, prevalence=("COVID-19:0.02",)),
)
FACTS = {
    "dataset": "folder/my_hospital", "fingerprint": "ab" * 32, "parameters": np.int64(2108672), "steps": 60,
    "counts": {"train": {"Normal": 1234, "Pneumonia": 30, "COVID-19": 40}}, "best_step": np.int64(40),
    "seconds": 3725.0, "versions": {"jax": "0.10.2"},
}  # fmt: skip
HISTORY = [
    {"step": 20, "epoch": 1.0, "train.loss": 1.0, "lr": 1e-3},
    {"step": 20, "epoch": 1.0, "val.slice.loss": 0.9, "val.slice.auc_macro": None},
    {"step": 40, "epoch": 2.0, "train.loss": 0.5, "lr": 1e-3},
    {"step": 40, "epoch": 2.0, "val.slice.loss": 0.6, "val.slice.auc_macro": 0.8125},
    {"step": 60, "epoch": 3.0, "train.loss": 0.4, "lr": 1e-3},
    {"step": 60, "epoch": 3.0, "val.slice.loss": 0.7, "val.slice.auc_macro": 0.75},
]


def make(seed=0, n=120, classes=CLASSES, tag="t"):
    labels = np.arange(n) // 3 % len(classes)
    return guesses(labels, classes, seed, tag=tag, sources=("mosmed", "radio.paedia.org"))


def image(row: int) -> np.ndarray:
    return np.full((20, 30, 1), row % 256, np.uint8)


def report(workdir, results, config=CONFIG, history=HISTORY, **facts) -> tuple[dict, str]:
    """Returns the report of a run without figures, and its Markdown."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        write.write_report(workdir, config, results, history, FACTS | facts, image)
    return json.loads((workdir / "report.json").read_text()), (workdir / "report.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def small_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 60)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with a report, and the predictions in it."""
    workdir, results = tmp_path_factory.mktemp("run"), {"val": make(1, 60, tag="v"), "test": make()}
    results = {split: calibration.apply_temperature(p, 1.5) for split, p in results.items()}
    write.write_report(workdir, CONFIG, results, HISTORY, FACTS, image, temperature=1.5)
    return workdir, results


def tables(text: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE)
    split = re.compile(r"(?<!\\)\|")
    return [[[c.strip() for c in split.split(row)[1:-1]] for row in b.splitlines()] for b in blocks]


def test_json_numbers(run):
    workdir, results = run
    saved = json.loads((workdir / "report.json").read_text())
    assert saved["version"] == 1 and saved["classes"] == list(CLASSES)
    test = results["test"]
    mosmed = test.sources == "mosmed"
    own = bootstrap.intervals(predictions.take(test, np.flatnonzero(mosmed)), 40)
    assert saved["test"]["subgroups"]["source"]["mosmed"]["intervals"]["accuracy"] == list(own["accuracy"])
    for unit in ("slice", "patient"):
        expected = bootstrap.intervals(test, 40, unit=unit)
        assert saved["test"][unit]["intervals"] == {name: list(ends) for name, ends in expected.items()}
    for split, p in results.items():
        for level in [saved[split]["slice"], saved[split]["patient"], *saved[split]["subgroups"]["source"].values()]:
            assert level.pop("intervals").keys() <= metrics.numbers(level).keys()
        assert saved[split] == json.loads(json.dumps(metrics.report_levels(p)))
    assert saved["test"]["subgroups"]["source"]["radio.paedia.org"]["n"] == (~mosmed).sum()
    assert saved["best"] == {"step": 40, "monitor": "slice.auc_macro", "score": 0.8125}
    assert saved["facts"]["parameters"] == 2108672
    # All keys of a level are documented.
    page = (Path(write.__file__).parents[1] / "evaluation/README.md").read_text()
    documented = set(re.findall(r"\w+", page.split("A level has these keys")[1]))
    level = saved["test"]["slice"]
    assert {*level, *level["per_class"]["Normal"], *level["study"]} <= documented


def test_calibration_and_operating_points(run, tmp_path):
    workdir, results = run
    saved = json.loads((workdir / "report.json").read_text())
    val, test = results["val"], results["test"]
    assert saved["calibration"] == json.loads(json.dumps(calibration.summary(test, 1.5, CONFIG.eval.draws)))
    points = operating_points.choose_all(val, test, CONFIG.eval)
    assert saved["operating_points"] == operating_points.evaluate(points, test, CONFIG.eval)
    text = (workdir / "report.md").read_text()
    for unit, level in (("image", "slice"), ("patient", "patient")):
        block = tables(text[text.index(f"Operating points, per {unit}") :])[0]
        rows = {tuple(row[:2]): row[2:] for row in block}
        point = saved["operating_points"][level]["COVID-19"]["youden"]
        low, high = point["intervals"]["npv_at"]
        assert rows["COVID-19", "youden"][0] == f"{point['threshold']:.3g}"
        assert rows["COVID-19", "youden"][-1] == f"{point['npv_at']:.3f} ({low:.3f} to {high:.3f})"
        assert rows["Normal", "sensitivity 0.95"][-2:] == ["-", "-"]
    assert "that of eval.prevalence: COVID-19 2 %." in text and "T = 1.500" in text
    alone, text = report(tmp_path, {"test": test})
    assert not {"calibration", "operating_points"} & alone.keys() and "Calibration" not in text


def test_controls_and_intervals(tmp_path):
    test = make()
    source = replace(test, probabilities=np.tile(np.float32([0.2, 0.3, 0.5]), (120, 1)))
    saved, text = report(tmp_path, {"test": test, "source_only": source, "no_lungs": test})
    controls = saved["controls"]
    assert "auc_macro" not in controls["source_only"]["intervals"], "no draw differs"
    gain = bootstrap.paired_difference(source, test, ["auc_macro"], 40)["auc_macro"]
    assert controls["source_only"]["gain"] == {"difference": gain.difference, "low": gain.low, "high": gain.high}
    assert controls["no_lungs"] == saved["test"]["slice"]
    assert "| 0.500 |" in text and "lungs blacked out" in text
    config = replace(CONFIG, eval=EvalConfig(draws=0))
    bare, text = report(tmp_path, {"test": test, "val": make(1, tag="v")}, config)
    assert (
        bare["test"]["slice"]["intervals"] == bare["operating_points"]["slice"]["Normal"]["youden"]["intervals"] == {}
    )
    assert not re.search(r"\d to \d", text)


def test_files(run):
    workdir, results = run
    for split, p in results.items():
        saved = predictions.read(workdir / f"predictions_{split}.csv")
        np.testing.assert_array_equal(saved.probabilities, p.probabilities)
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (workdir / "report.md").read_text())
    assert sorted(linked) == sorted(f"plots/{path.name}" for path in (workdir / "plots").iterdir())
    assert len(linked) == 8
    for name in linked:
        with Image.open(workdir / name) as picture:
            pixels = np.asarray(picture.convert("L"))
            assert min(picture.size) > 100 and (pixels < 128).mean() > 0.002, name
            # A white border: no text is cropped.
            assert min(pixels[[0, -1]].min(), pixels[:, [0, -1]].min()) == 255, name
    assert not list(workdir.rglob(".partial*"))


def test_markdown_numbers(run):
    workdir, _ = run
    saved, text = json.loads((workdir / "report.json").read_text()), (workdir / "report.md").read_text()
    assert "not for clinical use" in text
    blocks = tables(text)
    assert all(len({len(row) for row in table}) == 1 for table in blocks), "ragged rows"
    cells = {row[0]: row[1:] for table in blocks for row in table}
    columns = [saved[split][level] for split in ("test", "val") for level in ("slice", "patient")]
    for name, words in (("auc_macro", "AUC, mean over classes"), ("f1_weighted", "F1, weighted by class size")):
        numbers = [(level[name], *level["intervals"].get(name, ())) for level in columns]
        assert cells[words] == [str(Number(*number)) for number in numbers] and "to" in cells[words][0]
    assert cells["expected calibration error"] == [f"{level['ece']:.3f}" for level in columns], "it has no interval"
    assert [row[1:] for row in blocks[2][2:]] == [[str(n) for n in row] for row in saved["test"]["slice"]["confusion"]]
    mosmed = saved["test"]["subgroups"]["source"]["mosmed"]
    assert cells["mosmed"][:2] == [str(mosmed["patients"]), str(mosmed["n"])] and cells["mosmed"][-1].startswith(
        f"{mosmed['auc_macro']:.3f} ("
    )
    assert cells["train"] == ["1,234", "30", "40", "1,304"] and cells["eval.examples"] == ["3"]
    assert cells["time, last start to end"] == ["1 h 2 min"]
    assert "step 40, the best by val slice.auc_macro (0.8125)" in text and "2,108,672 parameters" in text


def test_flow_and_data_per_split(tmp_path):
    """Hand-made data set: five patients, one with two images; one image is in no split."""
    columns = {
        "split": ["train", "train", "train", "val", "test", ""], "group": list("aabcde"), "source": [""] * 6,
        "sex": ["F", "M", "", "M", "F", "F"], "age": ["50"] * 6,
    }  # fmt: skip
    data = Prepared("folder", CLASSES, {k: np.array(v) for k, v in columns.items()}, None, None, "")
    splits = summary.characteristics(data)
    assert splits["all"] == {
        "images": 5, "groups": 4, "columns": {"sex": {"F": 2, "M": 2, "unknown": 1}, "age": {"50": 4}},
    }  # fmt: skip
    train, found = {"images": 3, "groups": 2}, {"images": 9, "groups": 7}
    assert splits["train"] == train | {"columns": {"sex": {"F": 1, "M": 1, "unknown": 1}, "age": {"50": 2}}}
    read = {"images": 8, "groups": 6}
    about = {
        "flow": {"found": found, "skipped": {"unreadable": 1, "dark": 0}, "removed": {"copies": 2}},
        "unit": "image",
    }
    facts = {"characteristics": splits}
    flow = write._flow(about | read, splits, "clean")
    assert flow["skipped"] == {"unreadable": 1} and flow["prepared"] == read and flow["splits"]["train"] == train
    assert flow["removed"] == {"copies": 2, "in no split of this run": 1} and flow["used"]["images"] == 5
    assert write._flow(about | read, splits, "study")["removed"] == {"in no split of this run": 3}
    plots.flow(flow, tmp_path / "flow.png")
    assert Image.open(tmp_path / "flow.png").size[0] > 300
    rows = {row[0]: row[1:] for row in context._characteristics(splits).rows}
    assert rows["patients"] == [4, 2, 1, 1] and rows["sex: F"] == ["2 (50 %)", "1 (50 %)", "0 (0 %)", "1 (100 %)"]
    p = replace(make(), extra={"sex": np.array(["F"] * 12 + ["M"] * 108)})
    saved, text = report(tmp_path, {"test": p}, **facts)
    assert "fewer than 20 test patients: sex F (4)." in "\n".join(saved["warnings"])
    assert "Subgroups by sex, per image (test)" in text and "sex: unknown" in text


def test_warnings(tmp_path):
    p = make()

    def warned(test, val=None, history=HISTORY, config=CONFIG, **facts):
        results = {"test": test} if val is None else {"test": test, "val": val}
        return "\n".join(report(tmp_path, results, config, history, **facts)[0]["warnings"])

    assert warned(p, make(1, tag="v")) == ""
    where = np.flatnonzero(p.labels < 2)
    assert "test split has no examples of COVID-19" in warned(predictions.take(p, where))
    assert "few examples of Normal (15), Pneumonia (15) and COVID-19 (15)" in warned(make(n=45))
    mixed = replace(p, groups=np.where(p.groups == "t1", "t0", p.groups))
    assert "scores per patient exclude 1 patient" in warned(mixed)
    never = p.probabilities * np.float32([1, 1, 0])
    assert "Never predicted" in warned(replace(p, probabilities=never / never.sum(axis=1, keepdims=True)))
    constant = replace(p, probabilities=np.tile(np.float32([0.5, 0.3, 0.2]), (120, 1)))
    assert "0.350 is no better than" in warned(constant)
    assert "No two test images share a patient" in warned(replace(p, groups=p.ids))
    assert "come from 6 patients" in warned(make(n=18))
    assert "No operating point for COVID-19" in warned(p, replace(make(1, tag="v"), labels=np.arange(120) // 3 % 2))
    shared = replace(make(1, tag="v"), groups=np.array(["t7"] + [f"v{i // 3}" for i in range(1, 120)]))
    assert "share 1 patient, such as t7" in warned(p, shared)
    tied = warned(replace(p, sources=np.where(p.labels == 2, "mosmed", "cncb")))
    assert "one class only: mosmed (COVID-19)." in tied
    assert "All test examples of COVID-19 come from one source, mosmed." in tied
    last = replace(CONFIG, train=replace(CONFIG.train, keep="last"))
    assert "longer training" not in warned(p, config=last, best_step=60)
    assert "--set=train.epochs=20" in warned(p, best_step=60) and "longer training" not in warned(p, best_step=40)


def test_minimal_run(tmp_path):
    """A report of one image, with a class without examples, and without sources, history, facts or validation."""
    ids = np.array(["only.png"])
    p = Predictions(ids, ids, np.array([""]), np.array([1]), np.array([[0.2, 0.8]]), ("a|b", "c"))
    write.write_report(tmp_path, Config(eval=EvalConfig(draws=9)), {"test": p}, [], {}, image)
    text = (tmp_path / "report.md").read_text()
    assert r"| a\|b | 0 | - | - | 1.000 |" in text
    assert all(len({len(row) for row in table}) == 1 for table in tables(text))
    assert not (tmp_path / "plots" / "confusion_patient.png").exists()
    page = (tmp_path / "report.html").read_text()
    assert all(f">{words}</h2>" in page for words in context.SECTIONS.values())
    assert "Calibration" not in page and "Operating" not in page
    with pytest.raises(ValueError, match="test split"):
        write.write_report(tmp_path, Config(), {"val": p}, [], {}, image)


def test_earlier_report_after_invalid_predictions(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    p = make(5)
    p.probabilities[0] = np.nan
    with pytest.raises(ValueError, match=r"t_000\.png"):
        write.write_report(workdir, CONFIG, {"test": p}, HISTORY, FACTS, image)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_choice_of_examples():
    p = make(n=300)
    right, wrong = ([shown.row for shown in side] for side in plots.choose_examples(p, 6))
    assert len({*right, *wrong}) == 12
    assert all(p.predicted[right] == p.labels[right]) and all(p.predicted[wrong] != p.labels[wrong])
    assert p.labels[right].tolist() == p.labels[wrong].tolist() == [0, 1, 2, 0, 1, 2]
    confidence = p.probabilities.max(axis=1)
    for label in range(3):
        missed = np.flatnonzero((p.labels == label) & (p.predicted != label))
        assert wrong[label] == missed[confidence[missed].argmax()]


@pytest.fixture
def figures(monkeypatch):
    """Collects figures instead of saving them."""
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure))
    return figures


def test_curves(figures, tmp_path):
    p = make()
    p = replace(p, labels=np.where(p.labels == 2, 1, p.labels))  # COVID-19 has no examples
    for kind, area in (("roc", metrics.auc), ("pr", metrics.average_precision)):
        plots.curves(kind, p, tmp_path / "curves.png")
        lines = {line.get_label().split("\n")[0]: line for line in figures[-1].axes[0].lines}
        for i in (0, 1):
            x, y = lines[CLASSES[i]].get_data()
            expected = area(p.labels == i, p.probabilities[:, i])
            assert f"{expected:.3f}" in lines[CLASSES[i]].get_label()
            drawn = np.trapezoid(y, x) if kind == "roc" else -(np.diff(x) * y[:-1]).sum()
            assert drawn == pytest.approx(expected)
        assert lines["COVID-19"].get_label().endswith("undefined") and "all pooled (micro)" in lines


def test_curves_of_findings(figures, tmp_path):
    p = random_findings()
    plots.curves("roc", p, tmp_path / "curves.png")
    known = p.labels >= 0
    areas = [sk.roc_auc_score(p.labels[m, i], p.probabilities[m, i]) for i, m in enumerate(known.T)]
    areas.append(sk.roc_auc_score(p.labels[known], p.probabilities[known]))
    names = [line.get_label() for line in figures[-1].axes[0].lines if "AUC" in line.get_label()]
    assert names == [f"{name}\nAUC {a:.3f}" for name, a in zip((*p.classes, "all pooled (micro)"), areas, strict=True)]
    plots.decision_curves(p, tmp_path / "d.png")
    shares = [(p.labels[m, i] == 1).mean() for i, m in enumerate(known.T)]
    titles = [axis.get_title(loc="left") or axis.get_title() for axis in figures[-1].axes]
    assert titles == [f"{name} ({style.percent(share)})" for name, share in zip(p.classes, shares, strict=True)]


def test_reliability_and_decision_curves(figures, tmp_path):
    p = make(n=200, classes=tuple("abcde"))
    bins, scaled = calibration.bins(p), calibration.bins(calibration.apply_temperature(p, 2.0))
    plots.reliability({"uncalibrated": bins, "calibrated": scaled}, tmp_path / "r.png")
    plots.decision_curves(p, tmp_path / "d.png")
    upper, lower = figures[0].axes
    for line, each in zip(upper.lines[1:], (bins, scaled), strict=True):
        assert line.get_xydata().tolist() == [[b["confidence"], b["accuracy"]] for b in each if b["n"]]
    assert [bar.get_height() for bar in lower.patches] == [b["n"] for each in (bins, scaled) for b in each]
    for i, axis in enumerate([axis for axis in figures[1].axes if axis.get_visible()]):
        curve = operating_points.net_benefit(p, i)
        lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
        assert lines["network"] == curve["model"] and lines["treat all"] == curve["all"]


def test_training_curves(figures, tmp_path):
    plots.training_curves(HISTORY, tmp_path / "t.png", "slice.auc_macro", 40)
    loss, monitor, lr = ([line.get_xydata().tolist() for line in axis.lines] for axis in figures[0].axes)
    assert loss[:2] == [[[20, 1.0], [40, 0.5], [60, 0.4]], [[20, 0.9], [40, 0.6], [60, 0.7]]]
    assert monitor[0] == [[40, 0.8125], [60, 0.75]] and lr[0] == [[20, 1e-3], [40, 1e-3], [60, 1e-3]]
    assert all(lines[-1][0][0] == 40 for lines in (loss, monitor, lr)), "best step"
    history = [{"step": s, "train.loss": float(s % 2)} for s in range(1, 201)]
    plots.training_curves(history, tmp_path / "t.png", "slice.loss")
    noisy, smooth = (line.get_ydata() for line in figures[1].axes[0].lines)
    assert len(noisy) == len(smooth) == 200 and np.ptp(smooth[5:-5]) < 0.2 and np.ptp(noisy) == 1
