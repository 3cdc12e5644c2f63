import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from lungjax import compare
from lungjax.evaluation import bootstrap, predictions
from lungjax.evaluation.predictions import Predictions

FACTS = {"dataset": "folder/ct", "fingerprint": "ab" * 32}


def make(seed, spread, n=60, slices=3):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // slices % 2
    z = rng.normal(size=n) + spread * labels
    p = 1 / (1 + np.exp(-z))
    return Predictions(
        ids=np.array([f"i{i:02}" for i in range(n)]),
        groups=np.array([f"p{i // slices}" for i in range(n)]),
        sources=np.full(n, ""),
        labels=labels,
        probabilities=np.stack([1 - p, p], axis=1).astype(np.float32),
        classes=("COVID|x", "Normal"),
    )


def save(folder, p, name="tiny", split="test", **facts):
    folder.mkdir(exist_ok=True)
    predictions.write(p, folder / f"predictions_{split}.csv")
    (folder / "report.json").write_text(json.dumps({"name": name, "facts": FACTS | facts}))
    return folder


def rows(text: str) -> dict[str, list[str]]:
    split = re.compile(r"(?<!\\)\|")
    cells = [[c.strip() for c in split.split(line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    return {row[0].replace("\\", ""): row[1:] for row in cells[2:]}


def test_the_table_holds_the_paired_bootstrap(tmp_path):
    a, b = make(0, 0.5), make(1, 3.0)
    other = bootstrap.take(b, np.random.default_rng(0).permutation(60))
    folders = save(tmp_path / "a", a), save(tmp_path / "b", other, "large")
    text = compare.compare(*folders, draws=300, seed=2)
    found = rows(text)
    assert "(tiny, folder/ct)" in text and "(large, folder/ct)" in text
    assert "60 examples of test, 20 patients; 300 draws of patients, seed 2" in text
    for unit in ("slice", "patient"):
        wanted = bootstrap.paired_difference(a, b, draws=300, seed=2, unit=unit)
        for name in ("accuracy", "auc_macro", "brier", "per_class.COVID|x.recall"):
            d = wanted[name]
            cells = [f"{d.a:.3f}", f"{d.b:.3f}", f"{d.difference:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", f"{d.p:.3f}"]
            assert found[f"{unit}.{name}"] == cells
    assert float(found["slice.auc_macro"][2]) > 0.1 and float(found["slice.auc_macro"][4]) < 0.05
    names = ["patient.auc_macro", "slice.study.auc_micro_logits"]
    found = rows(compare.compare(*folders, names=["test." + names[0], names[1]], draws=50))
    assert list(found) == names and found[names[1]] == ["-"] * 5


def test_runs_that_cannot_be_compared_are_refused_with_the_reason(tmp_path):
    p = make(0, 1.0)
    a = save(tmp_path / "a", p)
    half = bootstrap.take(p, np.arange(30))
    labels = np.where(p.ids == "i07", 1 - p.labels, p.labels)
    for changed, facts, words in (
        (p, {"fingerprint": "cd" * 32}, "other versions of folder/ct, fingerprints abababababab and cdcdcdcdcdcd"),
        (p, {"dataset": "folder/xray"}, "other data sets, folder/ct and folder/xray"),
        (half, {}, "different examples, 60 and 30: 30 only in the first, such as i30"),
        (dataclasses.replace(p, labels=labels), {}, "different labels for 1 of 60 examples, such as i07"),
        (dataclasses.replace(p, classes=("x", "y")), {}, r"different classes: COVID\|x, Normal and x, y"),
    ):
        b = save(tmp_path / "b", changed, **facts)
        with pytest.raises(ValueError, match=f"/a and .*/b can't be compared: .*{words}"):
            compare.compare(a, b)
    b = save(tmp_path / "b", p, dataset="folder/ct-lungs-128", fingerprint="cd" * 32)
    assert "saw other images of these examples: folder/ct and folder/ct-lungs-128" in compare.compare(a, b, draws=9)


def test_what_is_missing_is_named(tmp_path):
    a = save(tmp_path / "a", make(0, 1.0))
    with pytest.raises(ValueError, match=r"a: no predictions_tset\.csv there; --split may be test"):
        compare.compare(a, a, "tset")
    with pytest.raises(ValueError, match=r"no number 'slice\.acuracy'; the nearest: slice\.accuracy"):
        compare.compare(a, a, names=["slice.acuracy"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no report\.json there"):
        compare.compare(a, tmp_path / "empty")
    b = save(tmp_path / "b", make(0, 1.0))
    for broken in ("{", "[]", "{}"):
        (b / "report.json").write_text(broken)
        with pytest.raises(ValueError, match=r"report\.json is no report of lungjax"):
            compare.compare(a, b)


def test_the_command_prints_writes_and_imports_no_jax(tmp_path):
    a, b = save(tmp_path / "a", make(0, 1.0)), save(tmp_path / "b", make(1, 1.0))
    code = (
        "import sys, atexit; atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr));"
        "from lungjax import compare, cli; cli.run(compare.main, compare.define_flags, ('RUN_A', 'RUN_B'))"
    )
    command = [sys.executable, "-c", code, str(a), "--draws=20", "--metrics=slice.accuracy,slice.loss", str(b)]
    result = subprocess.run([*command, f"--out={tmp_path / 'c.md'}"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.strip() == "False", result.stderr
    assert list(rows(result.stdout)) == ["slice.accuracy", "slice.loss"]
    assert (tmp_path / "c.md").read_text() == result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c.md"}
    wrong = subprocess.run([sys.executable, "-m", "lungjax.compare", str(a)], capture_output=True, text=True)
    assert wrong.returncode != 0 and "RUN_B missing: give RUN_A RUN_B" in wrong.stderr + wrong.stdout
