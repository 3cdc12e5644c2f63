"""Comparison of runs: numbers of the paired bootstrap and of the tests, and errors for incompatible runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from random_predictions import guesses

from lungjax import compare
from lungjax.evaluation import bootstrap, paired_tests, predictions

FACTS = {"dataset": "folder/ct", "fingerprint": "ab" * 32}


def make(seed, skill):
    return replace(guesses(np.arange(60) // 3 % 2, ("COVID|x", "Normal"), seed, skill, tag="i"), logits=None)


def save(folder, p, name="tiny", **facts):
    folder.mkdir(exist_ok=True)
    predictions.write(p, folder / "predictions_test.csv")
    (folder / "report.json").write_text(json.dumps({"name": name, "facts": FACTS | facts}))
    return folder


def rows(text: str, title: str = "B against A: paired bootstrap") -> dict[str, list[str]]:
    """Returns the table under a title."""
    text = text.split(f"### {title}\n")[1].split("###")[0]
    split = re.compile(r"(?<!\\)\|")
    cells = [[c.strip() for c in split.split(line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    return {row[0].replace("\\", ""): row[1:] for row in cells[2:]}


def test_numbers(tmp_path):
    a, b = make(0, 0.5), make(1, 3.0)
    shuffled = predictions.take(b, np.random.default_rng(0).permutation(60))
    folders = save(tmp_path / "a", a), save(tmp_path / "b", shuffled, "large")
    text = compare.compare(folders, draws=300)
    table = rows(text)
    assert "(tiny, folder/ct)" in text and "(large, folder/ct)" in text
    assert "60 examples of test, 20 patients; 300 bootstrap draws of patients" in text
    for unit in ("slice", "patient"):
        differences = bootstrap.paired_difference(a, b, draws=300, unit=unit)
        for name in ("accuracy", "auc_macro", "brier", "per_class.COVID|x.recall"):
            d = differences[name]
            cells = [f"{d.a:.3f}", f"{d.b:.3f}", f"{d.difference:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", f"{d.p:.3f}"]
            assert table[f"{unit}.{name}"][:5] == cells
    assert float(table["slice.auc_macro"][2]) > 0.1 and float(table["slice.auc_macro"][4]) < 0.05
    names = ["patient.auc_macro", "slice.study.auc_micro_logits"]
    table = rows(compare.compare(folders, names=["test." + names[0], names[1]], draws=50))
    assert list(table) == names and table[names[1]] == ["-"] * 6


def test_tests_and_correction(tmp_path):
    """Three runs: DeLong's test per slice and patient, McNemar's only per patient, and Holm's correction of all."""
    runs = [make(0, 0.5), make(1, 3.0), make(2, 0.6)]
    folders = [save(tmp_path / name, p) for name, p in zip("abc", runs, strict=True)]
    names = ["slice.auc_macro", "patient.accuracy", "slice.accuracy", "slice.loss", "patient.per_class.Normal.auc"]
    text = compare.compare(folders, names=names, draws=99)
    kinds = ("paired bootstrap", "DeLong's and McNemar's tests")
    boots, tests = ([rows(text, f"{x} against A: {kind}") for x in "BC"] for kind in kinds)
    assert all(list(table) == names for table in boots)
    assert all(list(table) == [names[0], names[1], names[4]] for table in tests)
    for x, b, table in zip("BC", runs[1:], tests, strict=True):
        expected = paired_tests.test(runs[0], b, names[0])
        assert table[names[0]][0] == table[names[4]][0] == "DeLong"
        assert table[names[0]][1].startswith(f"{x} - A: {expected.difference:+.3f} (")
        assert float(table[names[0]][2]) == pytest.approx(expected.p, abs=6e-4)
        m = paired_tests.test(runs[0], b, names[1])
        assert table[names[1]][:2] == ["McNemar", f"correct: only {x} {m.only_b}, only A {m.only_a}, of 20"]
    for tables, count in ((boots, 10), (tests, 6)):
        p = [float(row[-2]) for table in tables for row in table.values()]
        adjusted = [float(row[-1]) for table in tables for row in table.values()]
        assert len(p) == count and min(adjusted) == pytest.approx(min(1, count * min(p)), abs=0.006)
    assert "over 10 p-values of the bootstrap, and 6 of the other tests" in " ".join(text.split())


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
            compare.compare([a, b])
    b = save(tmp_path / "b", p, dataset="folder/ct-lungs-128", fingerprint="cd" * 32)
    assert "different images of these examples: folder/ct and folder/ct-lungs-128" in compare.compare([a, b], draws=9)


def test_missing_files_and_names(tmp_path):
    a, b = save(tmp_path / "a", make(0, 1.0)), save(tmp_path / "b", make(0, 1.0))
    with pytest.raises(ValueError, match=r"predictions_tset\.csv.*: test"):
        compare.compare([a, a], "tset")
    with pytest.raises(ValueError, match=r"did you mean slice\.accuracy"):
        compare.compare([a, a], names=["slice.acuracy"])
    for text in ("{", "[]", "{}"):
        (b / "report.json").write_text(text)
        with pytest.raises(ValueError, match="not a report"):
            compare.compare([a, b])
    (b / "report.json").unlink()
    with pytest.raises(ValueError, match=r"no report\.json"):
        compare.compare([a, b])


def test_command(tmp_path):
    a, b = save(tmp_path / "a", make(0, 1.0)), save(tmp_path / "b", make(1, 1.0))
    code = (
        "import sys, atexit; atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr));"
        "from lungjax import compare, cli; cli.run(compare.main, compare.define_flags, ('RUN_A', 'RUN_B...'))"
    )
    process = [sys.executable, "-c", code, str(a), "--draws=20", "--metrics=slice.accuracy,slice.loss", str(b)]
    result = subprocess.run(process, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.strip() == "False", result.stderr
    assert list(rows(result.stdout)) == ["slice.accuracy", "slice.loss"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
