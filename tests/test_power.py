"""Sample sizes: published standard errors of the AUC, Wilson's interval by SciPy, and wrong flags."""

import re

import commands
import pytest
from scipy import stats

from lungjax import power


def numbers(**given):
    """Returns the counts of positives and negatives, and the width that is printed."""
    text = power.plan(given)
    counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:positives|negatives)", text)]
    return *counts, float(text.rsplit(" ", 1)[1])


def test_width_of_an_auc():
    # Hanley and McNeil 1982: standard errors of an AUC of 0.85.
    for n, error in ((40, 0.0437), (60, 0.0356)):
        assert numbers(auc=0.85, positives=n, negatives=n)[2] == pytest.approx(2 * 1.96 * error, abs=6e-4)


def test_patients_for_a_width():
    for given in ({}, {"prevalence": 0.1}, {"prevalence": 0.7}, {"positives": 100}, {"negatives": 300}):
        positives, negatives, width = numbers(auc=0.85, width=0.1, **given)
        assert 0.098 < width <= 0.1
        fewer = (given.get("positives", positives - 1), given.get("negatives", negatives - 1))
        assert numbers(auc=0.85, positives=fewer[0], negatives=fewer[1])[2] >= 0.1
        if not given.keys() & {"positives", "negatives"}:
            assert positives / (positives + negatives) == pytest.approx(given.get("prevalence", 0.5), abs=0.01)
    for metric, kind in (("sensitivity", "positives"), ("specificity", "negatives")):
        n, width = numbers(**{metric: 0.9, "width": 0.1})
        ends = [stats.binomtest(round(0.9 * k), k).proportion_ci(method="wilson") for k in (n // 10 * 10, 100)]
        assert ends[0].high - ends[0].low == pytest.approx(0.1, abs=0.003) and width <= 0.1
        assert numbers(**{metric: 0.9, kind: n - 1})[1] >= 0.1
        assert numbers(**{metric: 0.9, kind: 100})[1] == pytest.approx(ends[1].high - ends[1].low, abs=6e-4)


def test_all_patients_and_limits():
    assert "(of 470 patients at a prevalence of 0.3)" in power.plan(
        {"sensitivity": 0.9, "width": 0.1, "prevalence": 0.3}
    )
    assert "at a prevalence of 0.5" in power.plan({"auc": 0.85, "width": 0.1})
    text = power.plan({"auc": 0.98, "positives": 10, "negatives": 10})
    assert "0.915 to 1.000 (the normal approximation is poor" in text and text.endswith("width 0.130")


def test_command(capsys):
    assert commands.run(power, "--auc=0.85", "--positives=40", "--negatives=40") == 0
    assert "AUC 0.85, 40 positives and 40 negatives (80 patients)" in capsys.readouterr().out
    cases = (
        ([], 2, "give one of --auc"),
        (["--auc=0.8", "--sensitivity=0.9"], 2, "got auc and sensitivity"),
        (["--auc=1", "--width=0.1"], 2, "--auc=1: expected"),
        (["--auc=0.8", "--width=10"], 2, "--width=10: expected"),
        (["--auc=0.8", "--positives=50"], 2, "give --width"),
        (["--auc=0.8", "--positives=50", "--negatives=50", "--width=0.1"], 2, "not all"),
        (["--auc=0.8", "--positives=50", "--prevalence=0.1", "--width=0.1"], 2, "--prevalence has no effect"),
        (["--sensitivity=0.8", "--negatives=50", "--width=0.1"], 2, "--negatives has no effect"),
        (["--auc=0.8", "--positives=20", "--width=0.01"], 2, "out of reach with 20 positives"),
        (["--auc=0.8", "--positives=0"], 1, "positives"),
        (["--auc=high"], 1, "auc"),
    )
    commands.assert_errors(capsys, power, cases)
