"""Predictions and their CSV file."""

import csv
import os
from unittest.mock import Mock

import numpy as np
import pytest

from lungjax.evaluation import predictions
from lungjax.evaluation.predictions import Predictions


def make(**changes) -> Predictions:
    fields = {
        "ids": np.array(["a,b.png", 'say "x".png', "line\nbreak $é.png"]),
        "groups": np.array(["p1", "", "p2"]),
        "sources": np.array(["mosmed", "", "a.b"]),
        "labels": np.array([0, 1, 1]),
        "probabilities": np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=np.float32),
        "classes": ("Normal", "COVID-19, severe"),
        "extra": {"id": np.array(["7", "", "0012"]), "p_value": np.array(["x", "y", "z"])},
    }
    return Predictions(**(fields | changes))


def test_csv_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    exact = rng.random((1000, 2)).astype(np.float32) ** np.float32(9)  # down to subnormal exponents
    exact[:4] = [[0, 1], [1, 0], [np.float32(1) / 3, np.float32(2) / 3], [1e-45, 1 - 6e-8]]
    ids = np.array([f"{i}.png" for i in range(1000)])
    many = Predictions(ids, ids, ids, rng.integers(0, 2, 1000), exact, ("a", "b"), {})
    with_logits = make(logits=np.array([[9.1, 7.0], [5.3, 6.7], [7.0, 7.0]], np.float32))
    odd_bytes = make(ids=np.array([b"\xff.png".decode("utf-8", "surrogateescape"), "b", "c"]))
    for given in (make(), many, predictions.take(many, np.arange(0)), with_logits, odd_bytes):
        predictions.write(given, tmp_path / "p.csv")
        p = predictions.read(tmp_path / "p.csv")
        assert p.probabilities.dtype == np.float32 and p.labels.dtype == np.int64 and p.classes == given.classes
        for name in ("ids", "groups", "sources", "labels", "probabilities", "logits"):
            np.testing.assert_array_equal(getattr(p, name), getattr(given, name))
        assert {name: list(v) for name, v in p.extra.items()} == {name: list(v) for name, v in given.extra.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_csv_columns(tmp_path):
    predictions.write(make(logits=np.zeros((3, 2), np.float32)), tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:7] == ["id", "group", "source", "label", "predicted", "p_Normal", "p_COVID-19, severe"]
    assert header[7:] == ["logit_Normal", "logit_COVID-19, severe", "extra_id", "extra_p_value"]
    assert rows[1][3:7] == ["COVID-19, severe", "COVID-19, severe", "0.2", "0.8"]
    assert rows[2][4] == "Normal", "tied probabilities"


def test_formulas_as_text(tmp_path):
    names = ["=HYPERLINK(1)", "-1", "'=x"]
    given = make(ids=np.array(names), groups=np.array(["@a", "+b", "c"]), classes=("=a", "-b"))
    predictions.write(given, tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert {cell for cell in cells if cell[:1] in set("=+-@")} == {"-1"}
    p = predictions.read(tmp_path / "p.csv")
    assert p.ids.tolist() == names and p.groups.tolist() == ["@a", "+b", "c"] and p.classes == ("=a", "-b")


def test_earlier_file_after_a_full_disk(tmp_path, monkeypatch):
    predictions.write(make(), tmp_path / "p.csv")
    before = (tmp_path / "p.csv").read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("No space")))
    with pytest.raises(OSError, match="No space"):
        predictions.write(make(labels=np.array([1, 0, 0])), tmp_path / "p.csv")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_inconsistent_fields():
    for changes, words in (
        ({"labels": np.array([0, 2, 1])}, "label 2"),
        ({"labels": np.array([0, -1, 1])}, "label -1"),
        ({"labels": np.array([0, 1])}, "labels"),
        ({"classes": ("a", "b", "c")}, "probabilities"),
        ({"classes": ("a", "a")}, "duplicate"),
        ({"extra": {"age": np.array(["1"])}}, "age"),
        ({"logits": np.zeros((3, 3))}, "logits"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**changes)


def test_broken_csv_line(tmp_path):
    header = "id,group,source,label,predicted"
    for text, words in (
        ("", "missing column id"),
        (f"{header}\n", "missing column p_CLASS"),
        (f"{header},p_a\nx,,,a,a\n", "line 2: 5 values"),
        (f"{header},p_a\nx,,,b,a,1\n", "line 2: label 'b'"),
        (f"{header},p_a\nx,,,a,a,1\ny,,,a,a,high\n", "line 3: .*'high'"),
        (f"{header},p_a,p_b,logit_b\nx,,,a,a,1,0,1\n", "logits"),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(ValueError, match=f"p.csv.*{words}"):
            predictions.read(tmp_path / "p.csv")
