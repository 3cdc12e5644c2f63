"""Comparison of two runs: numbers of the paired bootstrap, and errors for incompatible runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from random_predictions import guesses

from lungjax import compare
from lungjax.evaluation import bootstrap, predictions

FACTS = {"dataset": "folder/ct", "fingerprint": "ab" * 32}


def make(seed, skill):
    return replace(guesses(np.arange(60) // 3 % 2, ("COVID|x", "Normal"), seed, skill, tag="i"), logits=None)


def save(folder, p, name="tiny", **facts):
    folder.mkdir(exist_ok=True)
    predictions.write(p, folder / "predictions_test.csv")
    (folder / "report.json").write_text(json.dumps({"name": name, "facts": FACTS | facts}))
    return folder


def rows(text: str) -> dict[str, list[str]]:
    split = re.compile(r"(?<!\\)\|")
    cells = [[c.strip() for c in split.split(line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    return {row[0].replace("\\", ""): row[1:] for row in cells[2:]}


def test_numbers(tmp_path):
    a, b = make(0, 0.5), make(1, 3.0)
    shuffled = predictions.take(b, np.random.default_rng(0).permutation(60))
    folders = save(tmp_path / "a", a), save(tmp_path / "b", shuffled, "large")
    text = compare.compare(*folders, draws=300)
    table = rows(text)
    assert "(tiny, folder/ct)" in text and "(large, folder/ct)" in text
    assert "60 examples of test, 20 patients; 300 bootstrap draws of patients" in text
    for unit in ("slice", "patient"):
        differences = bootstrap.paired_difference(a, b, draws=300, unit=unit)
        for name in ("accuracy", "auc_macro", "brier", "per_class.COVID|x.recall"):
            d = differences[name]
            cells = [f"{d.a:.3f}", f"{d.b:.3f}", f"{d.difference:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", f"{d.p:.3f}"]
            assert table[f"{unit}.{name}"] == cells
    assert float(table["slice.auc_macro"][2]) > 0.1 and float(table["slice.auc_macro"][4]) < 0.05
    names = ["patient.auc_macro", "slice.study.auc_micro_logits"]
    table = rows(compare.compare(*folders, names=["test." + names[0], names[1]], draws=50))
    assert list(table) == names and table[names[1]] == ["-"] * 5


def test_different_runs(tmp_path):
    p = make(0, 1.0)
    a = save(tmp_path / "a", p)
    labels = np.where(p.ids == "i_007.png", 1 - p.labels, p.labels)
    for other, facts, word in (
        (p, {"fingerprint": "cd" * 32}, "versions"),
        (p, {"dataset": "folder/xray"}, "folder/xray"),
        (replace(p, labels=labels), {}, "such as i_007"),
    ):
        b = save(tmp_path / "b", other, **facts)
        with pytest.raises(ValueError, match=f"/a and .*/b can't be compared: .*{word}"):
            compare.compare(a, b)
    b = save(tmp_path / "b", p, dataset="folder/ct-lungs-128", fingerprint="cd" * 32)
    assert "different images of these examples: folder/ct and folder/ct-lungs-128" in compare.compare(a, b, draws=9)


def test_missing_files_and_names(tmp_path):
    a, b = save(tmp_path / "a", make(0, 1.0)), save(tmp_path / "b", make(0, 1.0))
    with pytest.raises(ValueError, match=r"predictions_tset\.csv.*: test"):
        compare.compare(a, a, "tset")
    with pytest.raises(ValueError, match=r"did you mean slice\.accuracy"):
        compare.compare(a, a, names=["slice.acuracy"])
    for text in ("{", "[]", "{}"):
        (b / "report.json").write_text(text)
        with pytest.raises(ValueError, match="not a report"):
            compare.compare(a, b)
    (b / "report.json").unlink()
    with pytest.raises(ValueError, match=r"no report\.json"):
        compare.compare(a, b)


def test_command(tmp_path):
    a, b = save(tmp_path / "a", make(0, 1.0)), save(tmp_path / "b", make(1, 1.0))
    code = (
        "import sys, atexit; atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr));"
        "from lungjax import compare, cli; cli.run(compare.main, compare.define_flags, ('RUN_A', 'RUN_B'))"
    )
    process = [sys.executable, "-c", code, str(a), "--draws=20", "--metrics=slice.accuracy,slice.loss", str(b)]
    result = subprocess.run(process, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.strip() == "False", result.stderr
    assert list(rows(result.stdout)) == ["slice.accuracy", "slice.loss"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
