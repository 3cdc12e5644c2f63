"""Reporting checklists: items of the guidelines, and answers from the files of a run."""

import json
import re

import numpy as np
import pytest
from conftest import without_pictures
from random_predictions import guesses

from lungjax import checklist
from lungjax.config import Config, EvalConfig, overrides
from lungjax.report import write

CONFIG = Config(name="tiny", eval=EvalConfig(draws=40))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    test, val = (guesses(np.arange(60) // 3 % 2, ("a|b", "Normal"), i, tag=tag) for i, tag in enumerate("tv"))
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        image = np.zeros((8, 8, 1), np.uint8)
        write.write_report(workdir, CONFIG, {"test": test, "val": val}, [], {"python": "3.12"}, lambda row: image)
    (workdir / "config.json").write_text(overrides.to_json(CONFIG))
    return workdir


def rows(text: str) -> dict[str, list[str]]:
    split = re.compile(r"(?<!\\)\|")
    cells = [[c.strip() for c in split.split(line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in cells} == {6}
    return {row[0]: row[1:] for row in cells[2:]}


def test_items_of_the_guidelines():
    """Numbers of items: CLAIM 44; TRIPOD+AI 27 in 52 parts; STARD-AI 40 in 48 parts."""
    for standard, count, parts in (("claim", 44, 44), ("tripod_ai", 27, 52), ("stard_ai", 40, 48)):
        numbers = [item[0] for item in checklist.STANDARDS[standard]["items"]]
        assert len(set(numbers)) == len(numbers) == parts
        assert list(dict.fromkeys(int(re.match(r"\d+", n)[0]) for n in numbers)) == list(range(1, count + 1))
    used = {key for s in checklist.STANDARDS.values() for item in s["items"] for key in item[3].split()}
    assert used == set(checklist.ANSWERS)


@pytest.mark.parametrize("standard", checklist.STANDARDS)
def test_answers_of_a_run(run, standard):
    text = checklist.checklist(run, standard)
    table = rows(text)
    assert checklist.STANDARDS[standard]["citation"].rpartition(" ")[2] in text
    for request, answer, place, authors in (row[1:] for row in table.values()):
        assert request and bool(answer) == bool(place) and (answer or authors == "authors must state")
    assert any(not row[2] for row in table.values())


def test_values_of_answers(run):
    saved = json.loads((run / "report.json").read_text())
    table = rows(checklist.checklist(run, "claim"))
    low, high = saved["test"]["slice"]["intervals"]["auc_macro"]
    assert f"{saved['test']['slice']['auc_macro']:.3f} ({low:.3f} to {high:.3f})" in table["32"][2]
    assert table["21"][2] == "60 images of 20 patients in test" and table["21"][4].startswith("authors must state:")
    assert table["33"][2:] == ["", "", "authors must state"]  # no external test
    assert "Python 3.12" in table["23"][2] and table["5"][2:] == ["", "", "authors must state"]
    other = run / "external" / "hospital"
    other.mkdir(parents=True)
    (other / "report.json").write_text((run / "report.json").read_text())
    assert rows(checklist.checklist(run, "claim"))["33"][2].startswith("hospital, 60 images: AUC")
    with pytest.raises(ValueError, match="finished run"):
        checklist.checklist(run / "plots", "claim")
