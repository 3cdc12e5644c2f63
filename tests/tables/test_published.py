"""Published numbers against other numbers from the same studies: confusion matrices, reports, totals and notes."""

from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
import pytest
from random_predictions import guesses

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import experiments
from lungjax.evaluation import metrics
from lungjax.runtime.mesh import make_mesh
from lungjax.tables import published
from lungjax.tables.published import TABLES
from lungjax.training import program
from lungjax.training.aot_compile import batch_shapes
from lungjax.weights.load import resolve

CELLS = {
    "nccid_test": 14, "nccid_val": 16, "ct_cov19_val": 8 * 5 * 4 + 4 + 1, "ct_cov19_test": 8 * 4, "ct_cov19_auc": 8 * 4,
    "ct_cov19_curves": 8, "ct_cov19_reports": 8 * 4 * 12, "ictcf_test": 9 * 4 + 4 * 3, "ictcf_reports": 9 * 12,
    "covid_xray": 10 * 5 + 2 * 2 + 2, "covidx_ct_3a": 4 * 14 + 1, "covidx_ct_2a": 14, "covidnet_ct_1": 3 * 7,
    "covidnet_ct_2a": 3 * 7, "transfusion": 8 * 2, "transfusion_chexpert": 5 * 2,
    "medmnist_pneumonia": 4 * 2, "medmnist_organa": 4 * 2, "medmnist_chest": 4 * 2,
}  # fmt: skip
TOTALS = {  # of splits without a confusion matrix
    ("ct_cov19_test", "val"): 1341, ("ct_cov19_test", "test"): 1876, ("ictcf_test", "test"): 2798,
    ("covid_xray", "test"): 1573, ("covidx_ct_2a", "test"): 25658, ("medmnist_pneumonia", "train"): 4708,
    ("medmnist_pneumonia", "val"): 524, ("medmnist_pneumonia", "test"): 624,
}  # fmt: skip
STUDY = ("f1_weighted", "auc_micro_logits", "f1_macro_harmonic", "accuracy_rounded")  # metrics of the studies
load = lru_cache(maxsize=None)(experiments.load)

# Printed numbers that contradict the study's own matrix, with the value of the matrix.
CONTRADICTIONS = {
    ("covidx_ct_3a", "test", "Normal F1"): 0.8901,
    ("covidx_ct_3a", "val, best epoch (4)", "Normal F1"): 0.9231,
}


def from_matrix(matrix, classes):
    """Returns {metric name: value} for a confusion matrix."""
    matrix = np.array(matrix)
    hits, true, taken = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    rates = {"precision": hits / taken, "recall": hits / true, "f1": 2 * hits / (true + taken)}
    values = {"accuracy": hits.sum() / true.sum()}
    for name, rate in rates.items():
        values |= {f"{name}_macro": rate.mean(), f"{name}_weighted": (rate * true).sum() / true.sum()}
        values |= {f"per_class.{label}.{name}": value for label, value in zip(classes, rate, strict=True)}
    p, r = values["precision_macro"], values["recall_macro"]
    return values | {"study.f1_macro_harmonic": 2 * p * r / (p + r)}


def rows(table):
    """Returns the published numbers as {row: {column: number}}."""
    numbers = {row: {} for row in TABLES[table].rows}
    for cell in TABLES[table].cells:
        numbers[cell.row][cell.column] = cell.published
    return numbers


def classes_of(table):
    return datasets.classes(load(TABLES[table].cells[0].experiment).data.dataset)


def test_confusion_matrices():
    tables = [name for name, table in TABLES.items() if table.matrices and name != "ictcf_test"]
    matrices = {(table, row): matrix for table in tables for row, matrix in TABLES[table].matrices.items()}
    assert len(matrices) == 16
    for (table, row), matrix in matrices.items():
        cells = [cell for cell in TABLES[table].cells if cell.row == row]
        assert tuple(np.sum(matrix, 1)) == TABLES[table].counts[cells[0].split]
        values = from_matrix(matrix, classes_of(table))
        compared = [cell for cell in cells if cell.name in values and cell.published is not None]
        assert len(compared) >= 7
        for cell in compared:
            # The reports of iCTCF use probabilities, its matrices rounded ones.
            slack = 0.015 if table == "ictcf_reports" else cell.slack
            expected = CONTRADICTIONS.get((table, row, cell.column), cell.published)
            assert expected == pytest.approx(values[cell.name], abs=slack + 1e-9), (table, row, cell.column)
            assert expected == cell.published or abs(cell.published - values[cell.name]) > slack


def test_ictcf_rounded_accuracies():
    for row, numbers in rows("ictcf_test").items():
        if "test accuracy, rounded" in numbers:
            rounded = np.trace(TABLES["ictcf_reports"].matrices[row]) / 2798
            assert numbers["test accuracy, rounded"] == pytest.approx(rounded, abs=0.5e-4)


def test_ct_cov19_tables_against_each_other():
    grid, areas = rows("ct_cov19_val"), rows("ct_cov19_auc")
    for row, numbers in rows("ct_cov19_test").items():
        best = max(grid[row], key=grid[row].get)  # the study chose by val F1
        assert grid[row][best] == numbers["Val F1"]
        area = areas[row].get(best.removeprefix("lungs-"))
        if area is not None:
            assert area == pytest.approx(numbers["Val AUC"], abs=0.5e-3)
    # The note on LargeT, which is identical to Tiny.
    noise = [abs(grid["Tiny"][column] - grid["LargeT"][column]) for column in grid["Tiny"]]
    assert np.mean(noise) == pytest.approx(0.044, abs=0.0005) and max(noise) == pytest.approx(0.158)


def test_covidx_rates_against_split_sizes():
    # Recall x support / precision is the number of predictions of a class; the sum is the number of images.
    for table, row, split in (
        ("covidx_ct_3a", "test, repeat run", "test"),
        ("covidx_ct_3a", "val, last epoch", "val"),
        ("covidx_ct_2a", "val, last epoch (3)", "val"),
    ):
        numbers, support = rows(table)[row], np.array(TABLES[table].counts[split])
        each = [[numbers[f"{name} {rate}"] for name in classes_of(table)] for rate in ("precision", "recall", "F1")]
        precision, recall, f1 = np.array(each)
        assert (recall * support / precision).sum() == pytest.approx(support.sum(), abs=5)
        assert np.dot(recall, support) / support.sum() == pytest.approx(numbers["accuracy"], abs=1e-4)
        np.testing.assert_allclose(f1, 2 * recall * precision / (recall + precision), atol=1.1e-4)
    # The numbers of 2A are not those of test, although its README suggests it.
    support = np.array(TABLES["covidx_ct_2a"].counts["test"])
    assert abs((recall * support / precision).sum() - support.sum()) > 50


def test_completeness_of_tables():
    assert {name: len(table.cells) for name, table in TABLES.items()} == CELLS
    assert {(name, split): sum(TABLES[name].counts[split]) for name, split in TOTALS} == TOTALS
    for name, table in TABLES.items():
        assert table.name == name and table.notes
        assert not table.chosen_from or set(table.rows) <= set(TABLES[table.chosen_from].rows)


def test_experiments_and_metrics():
    names = {}
    for table in TABLES.values():
        classes = classes_of(table.name)
        assert all(len(counts) == len(classes) for counts in table.counts.values())
        level = metrics.summarize(guesses(np.arange(len(classes)), classes, skill=50))
        metric_names = {key for key, value in level.items() if isinstance(value, float)}
        metric_names |= {f"study.{key}" for key in STUDY}
        metric_names |= {f"per_class.{label}.{rate}" for label in classes for rate in metrics.PER_CLASS}
        assert {cell.name for cell in table.cells} <= metric_names
        for row, text in {(cell.row, cell.experiment) for cell in table.cells}:
            config = load(text)
            configs.check(config)
            # The official splits of COVIDx CT-2A are the clean ones: `study` there is another study's resampling.
            clean = table.name.startswith("transfusion") or table.name == "covidnet_ct_2a" or "clean" in row
            assert config.data.protocol == ("clean" if clean else "study")
            # Names of run folders are unique.
            assert names.setdefault(config.name, text) == text


@pytest.mark.slow
def test_training_step_of_every_row():
    """Traces the augmented training step of each distinct network, head and augmentation in the tables."""
    programs = {}
    for text in {cell.experiment for table in TABLES.values() for cell in table.cells}:
        config = load(text)
        if "run:" in config.model.weights:  # a run that does not exist here
            config = replace(config, model=replace(config.model, weights="none"))
        config = resolve(config)
        classes, optim = datasets.classes(config.data.dataset) or ("a", "b"), config.optim
        key = config.model, config.input, config.augment, optim.name, optim.tune, optim.freeze, len(classes)
        programs[key] = text, replace(config, train=replace(config.train, devices=1)), classes
    for text, config, classes in programs.values():
        mesh = make_mesh(1)
        built = program.build(config, classes, np.arange(8 * config.train.batch_size) % len(classes), mesh)
        state, values = jax.eval_shape(built.train_step, built.abstract_state, batch_shapes(config, mesh))
        assert values["loss"].shape == () and state.step.shape == (), text


def test_printed_numbers():
    for text, value, decimals in (
        (".966", 0.966, 3), ("96.6%", 0.966, 3), ("90.00%", 0.9, 4), ("1", 1.0, 2), ("5.2392", 5.2392, 4),
        ("", None, 2),
    ):  # fmt: skip
        assert published.parse_number(text) == (value, decimals)
    with pytest.raises(ValueError, match=r"\.9o"):
        published.parse_number(".9o")
    header = "table,row,column,experiment,metric,published,note\n"
    entry = '[study]\n[table.t]\ntitle = "T"\nsource = "s"\n'
    table = published.read(header + "t,a,b,x,test.slice.loss,1.2,n\n", entry)["t"]
    assert table.cells[0].published == 1.2 and table.cells[0].decimals == 2 and table.cells[0].note == "n"
    with pytest.raises(ValueError, match="no entry"):
        published.read(header + "u,a,b,x,test.slice.loss,1.2,\n", entry)
