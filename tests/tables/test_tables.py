"""Tables: which runs count, what they say, what is chosen, drawn and written, and the smoke test of all cells."""

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from lungjax.config import overrides
from lungjax.evaluation import predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.runtime import signals
from lungjax.tables import cells, charts, results, runs, smoke
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


def guesses(split, skill, seed):
    """Predictions that are right more often the higher `skill`; two slices a patient."""
    labels = np.repeat(np.arange(3), COUNTS[split])
    rng = np.random.default_rng((seed, *split.encode()))
    logits = (rng.normal(size=(len(labels), 3)) + skill * np.eye(3)[labels]).astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.asarray([f"{split}{i}.png" for i in range(len(labels))])
    groups = np.asarray([f"p{i // 2}" for i in range(len(labels))])
    return Predictions(ids, groups, np.full(len(ids), ""), labels, shares, CLASSES, logits=logits)


def fabricate(run, skill=1.0, **facts):
    """Writes the folder of a finished run."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(overrides.to_json(run.config))
    (run.folder / "metrics.jsonl").write_text(
        '{"step": 1, "train.loss": 1.0}\n{"step": 2, "val.slice.accuracy": 0.5}\n'
    )
    counts = {split: dict(zip(CLASSES, COUNTS[split], strict=True)) for split in COUNTS}
    known = {"dataset": "phantom_ct/tiny", "fingerprint": "f" * 64, "counts": counts, "steps": 2}
    report = {"classes": list(CLASSES), "facts": known | facts}
    for split in ("val", "test"):
        made = guesses(split, skill, run.seed)
        predictions.write(made, run.folder / f"predictions_{split}.csv")
        report[split] = {"slice": {"accuracy": float((made.predicted == made.labels).mean())}}
    (run.folder / "report.json").write_text(json.dumps(report))


def cell(trial, row="a", column="F1", arguments="", metric="val.slice.f1_weighted", published=0.5, **kwargs):
    return Cell(row, column, f"{trial}{arguments}", metric, published, **kwargs)


def table(*found, **kwargs):
    return Table("t", "A table", "a page", found, **kwargs)


def test_verdict_gives_a_printed_number_the_slack_of_its_rounding():
    one = Cell("a", "b", "x", "val.slice.accuracy", 0.81, decimals=2)
    assert results.update(one, 0.7, 0.8) == "below"  # 0.805 is the least that is printed as 0.81
    assert results.update(one, 0.7, 0.8051) == "inside"
    assert results.update(one, 0.8149, 0.9) == "inside"
    assert results.update(one, 0.8151, 0.9) == "above"
    assert results.update(replace(one, published=None), 0.1, 0.2) == ""
    assert results.update(one, None, None) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": "val.f1"}, "SPLIT.UNIT.NAME"),
        ({"metric": "train.slice.f1"}, "SPLIT.UNIT.NAME"),
        ({"published": 81.0}, "0..1"),
    ],
)
def test_a_cell_that_makes_no_sense_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        cell("x", **arguments)
    with pytest.raises(ValueError, match="two cells at a, F1"):
        table(cell("x"), cell("y"))
    with pytest.raises(ValueError, match="nearest: curves"):
        table(cell("x"), charts=("curve",))


def spoil_report(run):
    (run.folder / "report.json").write_text('{"classes": [')


def spoil_csv(run):
    path = run.folder / "predictions_val.csv"
    path.write_text(path.read_text()[:-20])


def other_csv(run):
    predictions.write(guesses("val", 3.0, 77), run.folder / "predictions_val.csv")


def edit(name, change):
    def spoil(run):
        path = run.folder / name
        path.write_text(change(path.read_text()))

    return spoil


def no_report(run):
    (run.folder / "report.json").unlink()


def prepared_anew(run):
    where = run.folder.parents[2] / "data/phantom_ct/tiny/2.0.0"
    where.mkdir(parents=True)
    (where / "index.csv").write_text("x")
    (where / "lungjax.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda run: None, "finished", ""),
        (no_report, "unfinished", "no report.json"),
        (edit("metrics.jsonl", lambda text: text.splitlines()[0]), "unfinished", "step 1 of 2"),
        (edit("config.json", lambda text: text.replace('"lr": 0.001', '"lr": 0.5')), "other configuration", "optim.lr"),
        (edit("config.json", lambda text: text.replace('"log_steps": 10', '"log_steps": 7')), "finished", ""),
        (edit("report.json", lambda text: text.replace("phantom_ct/tiny", "folder/mine")), "other data", "folder/mine"),
        (edit("report.json", lambda text: text.replace("ffff", "0000")), "other data", "another seed"),
        (prepared_anew, "other data", "other images, labels or splits"),
        (spoil_report, "damaged", "can't be read"),
        (spoil_csv, "damaged", "predictions_val.csv"),
        (other_csv, "damaged", "accuracy"),
    ],
)
def test_only_a_finished_run_of_that_configuration_on_that_data_counts(trial, options, spoil, kind, words):
    planned = runs.plan(trial, options)
    for run in planned:
        fabricate(run)
    spoil(planned[1])
    group = results.Reader(table(cell(trial)), options).group(trial)
    assert group.states[1].kind == kind and words in group.states[1].reason, group.states[1]
    found = results.evaluate(table(cell(trial)), {}, results.Reader(table(cell(trial)), options, draws=50))[0]
    assert (found.ours is not None) == (kind == "finished")
    assert (planned[1].command in found.commands) == (kind != "finished")


def test_patience_ends_a_run_before_its_last_step(trial, options):
    run = runs.plan(trial, options)[0]
    fabricate(run, steps=9)
    assert runs.check(run, options.data_dir, {}).kind == "unfinished"
    lines = [json.dumps({"step": s, "val.slice.accuracy": a}) for s, a in ((1, 0.9), (2, 0.5), (3, 0.8), (4, 0.9))]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines))
    assert runs.check(run, options.data_dir, {}).kind == "finished"


def test_ours_is_the_mean_over_seeds_and_is_compared_with_what_was_published(trial, options):
    for run in runs.plan(trial, options):
        fabricate(run)
    expected = np.mean(
        [
            reference.f1_score(made.labels, made.predicted, average="weighted")
            for made in (guesses("val", 1.0, seed) for seed in (0, 1))
        ]
    )
    made = table(
        cell(trial, published=0.05),
        cell(trial, "a", "test acc", metric="test.slice.accuracy", published=1.0),
        cell(trial, "a", "same", published=round(expected, 3)),
        cell(trial, "b", "F1", ":size=64"),
    )
    found = results.evaluate(made, {}, results.Reader(made, options, draws=300))
    assert found[0].ours == pytest.approx(expected, abs=1e-9)
    assert found[0].low < expected < found[0].high and found[0].difference == pytest.approx(expected - 0.05)
    assert [r.verdict for r in found] == ["above", "below", "inside", ""]
    assert found[3].state == "not run" and found[3].ours is None
    folder = options.workdir / "trial_simple_64_phantom_ct_tiny"
    assert found[3].commands == tuple(
        f"python -m lungjax.main --experiment={trial}:size=64 --set=train.seed={seed} --workdir={folder}/seed{seed} "
        f"--data_dir={options.data_dir}"
        for seed in (0, 1)
    )
    elsewhere = replace(made, elsewhere="of other patients.")
    other = results.evaluate(elsewhere, {}, results.Reader(elsewhere, options, draws=300))
    assert other[0].ours == found[0].ours and not any(r.verdict for r in other)

    rows = list(csv.DictReader(results.as_csv(found).splitlines()))
    assert float(rows[0]["ours"]) == pytest.approx(expected, abs=1e-5) and rows[3]["ours"] == ""
    assert rows[3]["state"] == "not run" and rows[3]["command"].count("lungjax.main") == 2
    text = results.markdown(made, found, options, {"t_bars.png": "bars"})
    assert f"| a | F1 | 0.050 | {expected:.3f} |" in text and "not run" in text and found[3].commands[0] in text


def test_only_the_clean_protocol_may_lack_a_few_images_of_a_published_split(trial, options, monkeypatch):
    clean = runs.plan(trial, options)[0]
    study = replace(
        clean,
        folder=clean.folder.with_name("study"),
        config=overrides.override(clean.config, "data.protocol=study"),
        protocol="study",
    )
    for run in (clean, study):
        fabricate(run)
    monkeypatch.setattr(runs, "SPARE", 0.3)
    for run, counts, kind in (
        (clean, (10, 6, 5), "finished"),
        (clean, (10, 6, 6), "other data"),  # a third is too much
        (clean, (10, 6, 3), "other data"),  # and it never has more
        (study, (10, 6, 4), "finished"),
        (study, (10, 6, 5), "other data"),
    ):
        assert runs.check(run, options.data_dir, {"val": counts}).kind == kind


def test_a_stand_in_never_stands_in_a_study_s_table(trial, options):
    """Whether put there by an override, by other counts, or by a run in the wrong folder."""
    study = f"{trial}:dataset=ct_cov19"
    stood_in = replace(options, sets=("data.dataset=phantom_ct/tiny",))
    for run in runs.plan(study, stood_in):
        fabricate(run)
    made = table(cell(trial, arguments=":dataset=ct_cov19"))
    found = results.evaluate(made, {}, results.Reader(made, stood_in))[0]
    assert found.ours is None and found.state == "not run: other data" and "ct_cov19/original" in found.reason

    for run in runs.plan(trial, options):
        fabricate(run)
    shorter = replace(options, sets=("train.steps=2", "optim.lr=0.5"), workdir=options.workdir / "shorter")
    for run in runs.plan(trial, shorter):
        fabricate(run, 3.0)
    changed = table(cell(trial))
    found = results.evaluate(changed, {}, results.Reader(changed, shorter))[0]
    assert found.ours is not None and found.verdict == "", "another experiment: the published number says nothing of it"
    for counts, kind in (((10, 6, 4), "finished"), ((10, 6, 5), "other data")):
        made = table(cell(trial), counts={"val": counts})
        assert results.Reader(made, options).group(trial).states[0].kind == kind


def test_a_table_that_chooses_scores_the_configuration_best_on_val(trial, options):
    options = replace(options, seeds=1)
    sizes, skills = {"a": (48, 64), "b": (72, 80), "c": (88, 96)}, (0.2, 2.5, 1.5, 0.4, 0.9, 0.1)
    val = tuple(cell(trial, f"s{i}", row, f":size={size}") for row in sizes for i, size in enumerate(sizes[row]))
    for one, skill in zip(val, skills, strict=True):
        fabricate(runs.plan(one.experiment, options)[0], skill)
    test = tuple(
        cell(trial, row, column, ":size=48", metric, published)
        for row, both in (("a", (0.5, 0.9)), ("b", (0.6, 0.8)), ("c", (0.7, 0.7)))
        for column, metric, published in zip(
            ("Val", "Test"), ("val.slice.f1_weighted", "test.slice.accuracy"), both, strict=True
        )
    )
    chooser = table(*test, chosen_from="val", correlate=(("Val", "Test"),))
    tables = {"t": chooser, "val": replace(table(*val), name="val")}
    found = results.evaluate(chooser, tables, results.Reader(chooser, options, draws=50))
    assert [r.chosen.experiment.partition("size=")[2] for r in found] == ["64", "64", "72", "72", "88", "88"]
    accuracies = [(guesses("test", skill, 0).predicted == guesses("test", skill, 0).labels).mean()
                  for skill in (2.5, 1.5, 0.9)]  # fmt: skip
    assert [r.ours for r in found[1::2]] == pytest.approx(accuracies)
    rho = stats.spearmanr([r.ours for r in found[::2]], accuracies).statistic
    assert results.correlations(chooser, found) == [
        f"Spearman rank correlation of Val and Test: published -1.00, ours {rho:+.2f}."
    ]
    (runs.plan(val[0].experiment, options)[0].folder / "report.json").unlink()
    part = results.evaluate(chooser, tables, results.Reader(chooser, options, draws=50))
    assert part[0].state == "best of 1 of 2" and part[0].ours is not None and not part[0].verdict
    assert len(part[0].commands) == 1 and part[2].state == "finished"
    with pytest.raises(ValueError, match="no row or column 'd'"):
        cells.candidates(chooser, replace(test[0], row="d"), tables)


def test_curves_are_pooled_as_the_study_did(trial):
    p = guesses("val", 1.0, 0)
    one_hot = np.eye(3)[p.labels]
    for how, scores, average in (
        ("micro", p.probabilities, "micro"),
        ("macro", p.probabilities, "macro"),
        ("micro_logits", p.logits, "micro"),
    ):
        roc, pr = charts.pooled(p, how)
        assert roc[2] == pytest.approx(reference.roc_auc_score(one_hot, scores, average=average))
        assert pr[2] == pytest.approx(reference.average_precision_score(one_hot, scores, average=average))
        assert np.trapezoid(roc[1], roc[0]) == pytest.approx(roc[2], abs=5e-3)


def test_pictures_show_the_best_seed_and_go_when_their_runs_go(trial, options):
    made = table(
        *(cell(trial, row, column, f":size={size}") for row in "ab" for column, size in (("c", 48), ("d", 64))),
        charts=("bars", "confusions", "curves"),
    )
    for name, skill in ((trial + ":size=48", 0.5), (trial + ":size=64", 2.0)):
        for run in runs.plan(name, options):
            fabricate(run, skill)
    reader = results.Reader(made, options, draws=50)
    found = results.evaluate(made, {}, reader)
    ((name, best, seed, _),) = charts.best_runs(found, reader)
    scores = [
        reference.f1_score(g.labels, g.predicted, average="weighted") for g in (guesses("val", 2.0, s) for s in (0, 1))
    ]
    assert best.cell.column == "d" and seed == int(np.argmax(scores)) and name == "a, d"
    drawn = charts.draw(made, found, reader, options.workdir)
    assert sorted(drawn) == ["t_bars.png", "t_confusions.png", "t_curves.png"]
    assert all((options.workdir / file).stat().st_size > 5000 for file in drawn)
    nothing = [results.Result(one, "not run") for one in made.cells]
    assert list(charts.draw(made, nothing, reader, options.workdir)) == ["t_bars.png"]
    assert not (options.workdir / "t_curves.png").exists()


def test_missing_runs_are_made_and_one_that_fails_stops_no_other(trial, options, capfd):
    options = replace(options, seeds=1)
    made = table(cell(trial, "too small", arguments=":size=8"), cell(trial, published=0.5))
    said = []
    ((command, how),) = results.run_missing(made, {}, options, said.append).items()
    assert "size=8" in command and "exit code 2" in how and "too small" in how
    reader = results.Reader(made, options, 100, {command: how})
    found = results.evaluate(made, {}, reader)
    assert [r.state for r in found] == ["failed", "finished"] and 0 <= found[1].ours <= 1
    said.clear()
    made = table(cell(trial))
    assert results.run_missing(made, {}, options, said.append) == {} and not said  # finished: not run again
    assert "Report:" in capfd.readouterr().out


def test_what_is_not_prepared_is_said_once_and_not_tried(trial, options):
    made, said = table(cell(trial, arguments=":dataset=ct_cov19/lungs")), []
    failures = results.run_missing(made, {}, options, said.append)
    assert len(failures) == options.seeds and all("ct_cov19/lungs is not prepared" in why for why in failures.values())
    (line,) = said
    assert "python -m lungjax.prepare --dataset=ct_cov19/lungs --help" in line


def test_ctrl_c_reaches_the_run_once_and_waits_for_it(tmp_path, options, trial, monkeypatch, capfd):
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        f"def save(*_):\n    open({str(tmp_path / 'saved')!r}, 'a').write('x'); print('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(runs.sys, "executable", str(script))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(signals.Interrupted) as stop:
        runs.execute(runs.plan(trial, options)[0])
    assert stop.value.number == signal.SIGINT
    assert (tmp_path / "saved").read_text() == "x" and "saved" in capfd.readouterr().out


def test_smoke_tries_every_cell_and_lists_what_fails(trial):
    made = table(
        cell(trial),
        cell(trial, "a", "augmented", metric="test.patient.per_class.COVID-19.recall"),
        cell(trial, "b", "metric", metric="test.slice.f1_wighted"),
        cell(trial, "b", "loads", arguments=":modle=simple"),
        cell(trial, "b", "network", arguments=":model=cbr_tny"),
        cell(trial, "b", "data", arguments=":dataset=ct_cov20"),
        cell(trial, "b", "size", arguments=":size=9"),
    )
    lines = []
    failures = smoke.run({"t": made}, {"t": made}, lines.append)
    for word, line in zip(("f1_weighted", "no argument 'modle'", "cbr_tiny", "ct_cov19", "too small"), failures,
                          strict=True):  # fmt: skip
        assert word in line and line.startswith("t: b, ")
    assert any("a: 2 cells ok; 25,475 parameters, 1 trained" in line for line in lines)
    assert any("b: 5 cells 5 FAILED" in line for line in lines)
    assert "7 cells of 1 tables, 1 distinct networks trained: 5 failures" in lines[-1]


def test_smoke_sees_a_loss_that_is_no_number(monkeypatch, trial):
    config, classes = smoke.complete(trial)
    monkeypatch.setattr(
        smoke, "random_leaves", lambda like: {"head/dense/kernel": np.full((32, 3), np.inf, np.float32)}
    )
    assert "at step 1" in smoke.attempt(config, classes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table=ct_cov19_vl"], "nearest: ct_cov19_val"),
        (["--table=ct_cov19_val"], "--workdir=DIR is missing"),
        (["--table=ct_cov19_val", "--workdir=w", "--set=optim.lrr=1"], "nearest: optim.lr"),
    ],
)
def test_mistakes_end_in_a_message(tmp_path, arguments, words):
    command = [sys.executable, "-m", "lungjax.tables", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert result.returncode != 0 and words in said and "Traceback" not in said and not (tmp_path / "w").exists()
