"""Results tables: states of runs, numbers, verdicts, files, and charts."""

import csv
import json
import os
import signal
import sys
import threading
from dataclasses import replace

import commands
import numpy as np
import pytest
from random_predictions import guesses
from scipy import stats
from sklearn import metrics as reference

from lungjax.config import overrides
from lungjax.data import prepared
from lungjax.evaluation import bootstrap, calibration, predictions
from lungjax.report import templating
from lungjax.runtime import signals
from lungjax.tables import __main__ as command
from lungjax.tables import cells, charts, results, runs
from lungjax.tables.cells import Cell, Table

CLASSES = ("Normal", "Pneumonia", "COVID-19")
COUNTS = {"train": (4, 4, 4), "val": (10, 6, 4), "test": (9, 8, 7)}
EXPERIMENT = """
from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, TrainConfig

def get_config(model: str = "simple", size: int = 48, lr: float = 1e-3, dataset: str = "phantom_ct/tiny") -> Config:
    return Config(
        name=f"trial_{model}_{size}_{dataset.replace('/', '_')}",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(size, size)),
        model=ModelConfig(name=model),
        train=TrainConfig(batch_size=4, steps=2, patience=3, monitor="slice.accuracy"),
    )
"""


@pytest.fixture
def trial(tmp_path):
    path = tmp_path / "trial.py"
    path.write_text(EXPERIMENT)
    return str(path)


@pytest.fixture
def options(tmp_path):
    return runs.Options(tmp_path / "runs", tmp_path / "data", seeds=2)


def predict(split, skill, seed):
    labels = np.repeat(np.arange(3), COUNTS[split])
    return guesses(labels, CLASSES, (seed, *split.encode()), skill, slices=2, tag=split)


def fabricate(run, skill=1.0, **facts):
    """Writes a folder like that of a finished run."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(overrides.to_json(run.config))
    history = '{"step": 1, "train.loss": 1.0}\n{"step": 2, "val.slice.accuracy": 0.5}\n'
    (run.folder / "metrics.jsonl").write_text(history)
    counts = {split: dict(zip(CLASSES, COUNTS[split], strict=True)) for split in COUNTS}
    run_facts = {"dataset": "phantom_ct/tiny", "fingerprint": "f" * 64, "counts": counts, "steps": 2}
    report = {"classes": list(CLASSES), "facts": run_facts | facts}
    for split in ("val", "test"):
        p = predict(split, skill, run.seed)
        predictions.write(calibration.apply_temperature(p, 2.5), run.folder / f"predictions_{split}.csv")
        report[split] = {"slice": {"accuracy": float((p.predicted == p.labels).mean())}}
    (run.folder / "report.json").write_text(json.dumps(report))


def cell(trial, row="a", column="F1", arguments="", metric="val.slice.f1_weighted", published=0.5, **kwargs):
    return Cell(row, column, f"{trial}{arguments}", metric, published, **kwargs)


def table(*own, **kwargs):
    return Table("t", "A table", "a page", own, **kwargs)


def evaluate(sample, options, draws=50, tables=None):
    return results.evaluate(sample, tables or {}, results.Reader(sample, options, draws))


def test_verdict_with_rounding():
    one = Cell("a", "b", "x", "val.slice.accuracy", 0.81, decimals=2)
    # 0.805 is the lowest number printed as 0.81, 0.815 the highest.
    ends = {(0.7, 0.8): "below", (0.7, 0.8051): "inside", (0.8149, 0.9): "inside", (0.8151, 0.9): "above"}
    assert {pair: results.compare(one, *pair) for pair in ends} == ends
    assert results.compare(one, None, None) == results.compare(replace(one, published=None), 0.1, 0.2) == ""


def test_invalid_cells_and_tables():
    for metric in ("val.f1", "train.slice.f1", "test.slice.f1@1", "val.slice.f1@0", "val.slice.f1@1/9"):
        with pytest.raises(ValueError, match="SPLIT.UNIT.NAME"):
            cell("x", metric=metric)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        cell("x", published=81.0)
    with pytest.raises(ValueError, match="two cells"):
        table(cell("x"), cell("y"))
    with pytest.raises(ValueError, match="curves"):
        table(cell("x"), charts=("curve",))
    with pytest.raises(ValueError, match="matrices"):
        table(cell("x"), matrices={"b": [[1]]})


@pytest.mark.parametrize(
    ("name", "old", "new", "kind", "word"),
    [
        ("config.json", '"log_steps": 10', '"log_steps": 7', "finished", ""),
        ("report.json", None, None, "unfinished", "report.json"),
        ("metrics.jsonl", '\n{"step": 2, "val.slice.accuracy": 0.5}', "", "unfinished", "step 1 of 2"),
        ("config.json", '"lr": 0.001', '"lr": 0.5', "other configuration", "optim.lr"),
        ("report.json", "phantom_ct/tiny", "folder/mine", "other data", "folder/mine"),
        ("report.json", "ffff", "0000", "other data", "another seed"),
        ("", None, None, "other data", "splits"),
        ("report.json", '{"classes"', "{", "damaged", "report.json"),
        ("predictions_val.csv", "val_019", "\n", "damaged", "predictions_val.csv"),
        ("report.json", '"accuracy": 0', '"accuracy": 1', "damaged", "accuracy"),
    ],
)
def test_state_of_a_run(trial, options, name, old, new, kind, word):
    planned = runs.plan(trial, options)
    for run in planned:
        fabricate(run)
    path = planned[1].folder / name
    if not name:  # the data set was prepared again
        folder = prepared.directory(options.data_dir, "phantom_ct/tiny")
        folder.mkdir(parents=True)
        for file in (prepared.INDEX, "lungjax.json"):
            (folder / file).write_text("x")
    elif old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    state = results.Reader(table(cell(trial)), options).group(trial).states[1]
    assert state.kind == kind and word in state.reason
    result = evaluate(table(cell(trial)), options)[0]
    assert (result.ours is not None) == (kind == "finished")
    assert (planned[1].command in result.commands) == (kind != "finished")


def test_numbers_verdicts_and_files(trial, options):
    for run in runs.plan(trial, options):
        fabricate(run)
    seeds = [predict("val", 1.0, seed) for seed in (0, 1)]
    expected = np.mean([reference.f1_score(p.labels, p.predicted, average="weighted") for p in seeds])
    sample = table(
        cell(trial, published=0.05, note="A note | of ours."),
        cell(trial, "a", "test acc", metric="test.slice.accuracy", published=1.0),
        cell(trial, "a", "loss", metric="val.slice.loss"),
        cell(trial, "a", "same", published=round(expected, 3)),
        cell(trial, "b", "F1", ":size=64"),
    )
    answers = evaluate(sample, options, 300)
    assert answers[0].ours == pytest.approx(expected, abs=1e-9)
    assert answers[0].low < expected < answers[0].high and answers[0].difference == pytest.approx(expected - 0.05)
    assert [answers[i].verdict for i in (0, 1, 3, 4)] == ["above", "below", "inside", ""]
    losses = [reference.log_loss(p.labels, p.probabilities) for p in seeds]
    assert answers[2].ours == pytest.approx(np.mean(losses), abs=1e-6), "calibrated, unlike the published one"
    assert answers[4].state == "not run" and answers[4].ours is None
    assert answers[4].commands[1] == (
        f"python -m lungjax.main --experiment={trial}:size=64 --set=train.seed=1 "
        f"--workdir={options.workdir}/trial_simple_64_phantom_ct_tiny/seed1 --data_dir={options.data_dir}"
    )
    other = evaluate(replace(sample, elsewhere="of other patients."), options, 300)
    assert other[0].ours == answers[0].ours and not any(r.verdict for r in other)
    path = results.write(sample, answers, options, {"t_bars.png": "bars"})
    rows = list(csv.DictReader((path.parent / "t.csv").read_text().splitlines()))
    assert float(rows[0]["ours"]) == pytest.approx(expected, abs=1e-5) and rows[4]["ours"] == ""
    assert rows[4]["state"] == "not run" and rows[4]["command"].count("lungjax.main") == 2
    text = path.read_text()
    assert f"| a | F1 | 0.050 | {expected:.3f} |" in text and r"A note \| of ours." in text and "(t_bars.png)" in text
    assert "not run" in text and answers[4].commands[0] in text


def test_counts_of_the_published_splits(trial, options, monkeypatch):
    """Only the clean protocol may lack a few images; extra images are never allowed."""
    clean = runs.plan(trial, options)[0]
    config = overrides.override(clean.config, "data.protocol=study")
    study = replace(clean, folder=clean.folder.with_name("study"), config=config, protocol="study")
    monkeypatch.setattr(runs, "MAX_EXCLUDED", 0.3)
    for run, last, allowed in ((clean, (3, 4, 5, 6), (4, 5)), (study, (4, 5), (4,))):
        fabricate(run)
        states = {n: runs.check(run, options.data_dir, {"val": (10, 6, n)}).kind for n in last}
        assert states == {n: "finished" if n in allowed else "other data" for n in last}


def test_incomplete_copy_of_a_data_set(trial, options):
    """Each class may lack `max_missing` of its images (and 2 % under the clean protocol), and the cells say so."""
    for run in runs.plan(trial, options):
        fabricate(run)
    one = cell(trial, metric="val.slice.accuracy", published=0.99)
    for counts, missing, finished in (
        ((10, 6, 5), 0.2, True), ((10, 6, 5), 0.17, False), ((10, 6, 3), 0.5, False), ((13, 6, 4), 0.2, False),
    ):  # fmt: skip
        sample = table(one, counts={"val": counts}, max_missing=missing)
        result = evaluate(sample, options)[0]
        assert (result.ours is not None) == finished and (result.state == "finished") == finished
        if finished:
            assert result.verdict == "below" and result.reason == "4 of 5 COVID-19 val images"
            path = results.write(sample, [result], options, {})
            assert "| below, 4 of 5 COVID-19 val images |" in path.read_text()
        else:
            assert result.state == "not run: other data"
    assert evaluate(table(one, counts={"val": (10, 6, 4)}), options)[0].reason == ""


def test_scores_of_random_draws(trial, options):
    """A published score of a few images is compared with draws of as many, even if no other score is comparable."""
    for run in runs.plan(trial, options):
        fabricate(run)
    small, large, every = (f"test.slice.accuracy{size}" for size in ("/4", "/20", ""))
    metrics = (small, large, every, "test.slice.loss/25")
    own = [cell(trial, column=metric, metric=metric, published=0.3) for metric in metrics]
    few, many, complete, too_many = evaluate(table(*own, elsewhere="a few images"), options, 400)
    assert few.ours == many.ours == complete.ours and few.high - few.low > many.high - many.low
    assert (few.verdict, many.verdict, complete.verdict) == ("inside", "above", "")
    assert too_many.ours is None and "25 examples" in too_many.reason


def test_overrides_without_verdict(trial, options):
    """Runs with another data set or configuration get no verdict."""
    override = replace(options, sets=("data.dataset=phantom_ct/tiny",))
    for run in runs.plan(f"{trial}:dataset=ct_cov19", override):
        fabricate(run)
    result = evaluate(table(cell(trial, arguments=":dataset=ct_cov19")), override)[0]
    assert result.ours is None and result.state == "not run: other data" and "ct_cov19/original" in result.reason
    changed = replace(options, sets=("train.steps=2", "optim.lr=0.5"))
    for run in runs.plan(trial, changed):
        fabricate(run, 3.0)
    result = evaluate(table(cell(trial)), changed)[0]
    assert result.ours is not None and result.verdict == ""


def test_validations_during_training(trial, options):
    for run in runs.plan(trial, options):
        fabricate(run)
        with (log := run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "val.slice.accuracy": null}\n{"step": 4, "val.slice.accuracy": 0.9}\n')
    log.write_text(log.read_text().replace("0.5", "0.7"))
    sample = table(*(cell(trial, column=f"{n}", metric=f"val.slice.accuracy@{n}", published=0.61) for n in (1, 2, 3)))
    first, second, third = evaluate(sample, options)
    assert third.ours == pytest.approx(0.9)
    assert first.ours == pytest.approx(0.6) and first.low is None and not first.verdict
    assert second.ours is None and second.state == "undefined"
    assert not charts.draw(replace(sample, charts=("confusions",)), [first, second], options.workdir)


def test_table_that_chooses(trial, options):
    options = replace(options, seeds=1)
    sizes, skills = {"a": (48, 64), "b": (72, 80), "c": (88, 96)}, (0.2, 2.5, 1.5, 0.4, 0.9, 0.1)
    val = tuple(cell(trial, f"s{i}", row, f":size={size}") for row in sizes for i, size in enumerate(sizes[row]))
    for one, skill in zip(val, skills, strict=True):
        fabricate(runs.plan(one.experiment, options)[0], skill)
    columns = {"Val": "val.slice.f1_weighted", "Test": "test.slice.accuracy"}
    published = iter((0.5, 0.9, 0.6, 0.8, 0.7, 0.7))
    test = [cell(trial, row, name, ":size=48", columns[name], next(published)) for row in "abc" for name in columns]
    chooser = table(*test, chosen_from="val", correlate=(("Val", "Test"),))
    tables = {"t": chooser, "val": replace(table(*val), name="val")}
    answers = evaluate(chooser, options, tables=tables)
    assert [r.chosen.experiment.partition("size=")[2] for r in answers] == ["64", "64", "72", "72", "88", "88"]
    tested = [predict("test", skill, 0) for skill in (2.5, 1.5, 0.9)]
    accuracies = [(p.predicted == p.labels).mean() for p in tested]
    assert [r.ours for r in answers[1::2]] == pytest.approx(accuracies)
    rho = stats.spearmanr([r.ours for r in answers[::2]], accuracies).statistic
    (line,) = results.correlations(chooser, answers)
    assert f"published -1.00, ours {rho:+.2f}" in line
    (runs.plan(val[0].experiment, options)[0].folder / "report.json").unlink()
    part = evaluate(chooser, options, tables=tables)
    assert part[0].state == "best of 1 of 2" and part[0].ours is not None and not part[0].verdict
    assert len(part[0].commands) == 1 and part[2].state == "finished"
    with pytest.raises(ValueError, match="'d'"):
        cells.candidates(chooser, replace(test[0], row="d"), tables)


def test_charts_of_the_best_runs(trial, options):
    sample = table(
        *(cell(trial, row, column, f":size={size}") for row in "ab" for column, size in (("c", 48), ("d", 64))),
        charts=("bars", "confusions", "curves"),
    )
    for name, skill in ((trial + ":size=48", 0.5), (trial + ":size=64", 2.0)):
        for run in runs.plan(name, options):
            fabricate(run, skill)
    answers = evaluate(sample, options)
    ((name, best, seed, _),) = charts.best_runs(answers)
    scores = [
        reference.f1_score(p.labels, p.predicted, average="weighted") for p in (predict("val", 2.0, s) for s in (0, 1))
    ]
    assert best.cell.column == "d" and seed == int(np.argmax(scores)) and name == "a, d"
    files = ["t_bars.png", "t_confusions.png", "t_curves.png"]
    assert list(charts.draw(sample, answers, options.workdir)) == files
    assert all((options.workdir / file).stat().st_size > 5000 for file in files)
    nothing = [replace(answer, ours=None, low=None, high=None) for answer in answers]
    assert list(charts.draw(sample, nothing, options.workdir)) == files[:1]
    assert not (options.workdir / files[2]).exists(), "chart of deleted runs"


def test_published_confusion_matrices(trial, options, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts.plots, "confusion_cells", lambda axis, counts, *_: drawn.append(counts))
    cells_of = [cell(trial, "a", split, metric=f"{split}.slice.accuracy") for split in ("test", "val")]
    sample = table(
        *cells_of, charts=("confusions",), counts={"val": COUNTS["val"]}, matrices={"a": np.diag((10, 6, 4))}
    )
    for run in runs.plan(trial, options):
        fabricate(run)
    charts.draw(sample, evaluate(sample, options), options.workdir)
    assert [counts.sum() for counts in drawn] == [24, 20, 20]  # the published one is of the val split
    assert [np.trace(counts) == 20 for counts in drawn] == [False, False, True]


def test_execute_missing_runs(trial, options, monkeypatch):
    """Continues after a failed run, skips finished runs, and reports unprepared data once."""
    sample = table(cell(trial), cell(trial, "b", arguments=":size=8"), cell(trial, "c", arguments=":dataset=ct_cov19"))
    executed, output = [], []

    def execute(run):
        executed.append(run.command)
        if "size=8" in run.experiment:
            return 2, "lungjax: too small"
        return fabricate(run) or (0, "")

    monkeypatch.setattr(runs, "execute", execute)
    failures = results.run_missing(sample, {}, options, output.append)
    assert len(executed) == 4 and len(failures) == 4
    assert sum("exit code 2" in error and "too small" in error for error in failures.values()) == 2
    assert sum("lungjax.prepare --dataset=ct_cov19" in line for line in output) == 1
    answers = results.evaluate(sample, {}, results.Reader(sample, options, 100, failures))
    assert [r.state for r in answers] == ["finished", "failed", "failed"]
    executed.clear()
    assert results.run_missing(table(cell(trial)), {}, options, output.append) == {} and not executed


def test_ctrl_c_during_a_run(tmp_path, options, trial, monkeypatch, capfd):
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        f"def save(*_):\n    open({str(tmp_path / 'saved')!r}, 'a').write('x'); print('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(signals.Interrupted) as stop:
        runs.execute(runs.plan(trial, options)[0])
    assert stop.value.number == signal.SIGINT
    assert (tmp_path / "saved").read_text() == "x" and "saved" in capfd.readouterr().out


def test_runs_pooled_over_seeds(trial, options, capsys):
    for run in (*runs.plan(trial, options), *runs.plan(f"{trial}:size=64", options)):
        fabricate(run)
        p = predictions.read(path := run.folder / "predictions_test.csv")
        second = "rest" if run.config.input.size[0] == 64 else "south"  # another source in one configuration
        predictions.write(replace(p, sources=np.where(np.arange(len(p)) % 3, "west", second)), path)
    assert commands.run(command, "--pool", "--draws=100", f"--workdir={options.workdir}") == 0
    text, pool = (
        capsys.readouterr().out,
        [calibration.apply_temperature(predict("test", 1.0, seed), 2.5) for seed in (0, 1)],
    )
    rows = [line for line in text.splitlines() if "| simple | none | 2 |" in line]
    assert len(rows) == 2 and "trial_simple_64_phantom_ct_tiny/seed0" in rows[1]
    for score in ("slice.auc_macro", "patient.auc_macro", "slice.accuracy", "slice.balanced_accuracy"):
        unit, name = score.split(".")
        number = templating.Number(*bootstrap.over_runs(pool, [name], 100, unit=unit)[name])
        assert all(f"| {number} |" in row for row in rows)
    for second in ("south", "rest"):
        assert f"| AUC; accuracy per slice | west, 16 images | {second}, 8 images |" in text
    assert commands.run(command, "--pool", f"--workdir={options.data_dir}") == 2
    assert "no finished" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    assert commands.run(command, "--list") == 0
    assert "ct_cov19_val\n" in capsys.readouterr().out
    workdir = f"--workdir={tmp_path / 'w'}"
    cases = (
        (["--table=ct_cov19_vl"], 2, "ct_cov19_val"),
        (["--table=ct_cov19_val"], 1, "--workdir"),
        (["--table=nccid_val", workdir, "--set=optim.lrr=1"], 2, "optim.lr"),
    )
    commands.assert_errors(capsys, command, cases)
    assert not (tmp_path / "w").exists()
    assert commands.run(command, "--table=nccid_val", workdir, "--seeds=1") == 0
    assert "0.9804" in capsys.readouterr().out and (tmp_path / "w/tables/nccid_val.md").is_file()
