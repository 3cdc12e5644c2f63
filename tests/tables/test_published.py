"""The published numbers against each other: matrices, reports, supports and headlines of one study must agree.

The confusion matrices, entered here alone, are the reference: the tables hold the numbers printed beside them.
"""

import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import experiments
from lungjax.evaluation import metrics
from lungjax.tables.published import TABLES, covidnet_ct, ct_cov19, ictcf, printed

CELLS = {
    "nccid_test": 14,
    "nccid_val": 2,
    "ct_cov19_val": 8 * 5 * 4 + 4 + 1,  # and the LargeT of the paper
    "ct_cov19_test": 8 * 4,
    "ct_cov19_auc": 8 * 4,
    "ct_cov19_curves": 8,
    "ct_cov19_reports": 8 * 4 * 12,
    "ictcf_test": 9 * 4,
    "ictcf_reports": 9 * 12,
    "covid_xray": 6 * 5 + 2,
    "covidx_ct_3a": 3 * 14 + 3,
    "covidx_ct_2a": 14,
    "covidnet_ct_1": 3 * 7,
    "covidnet_ct_2a": 3 * 7,
    "transfusion": 5 * 2,
}
load = lru_cache(maxsize=None)(experiments.load)  # each is asked for by several tests
STUDY = ("f1_weighted", "auc_micro_logits", "f1_macro_harmonic", "accuracy_rounded")  # the studies' own metrics

# Table, row: the published confusion matrix, a row a true class.
MATRICES = {
    ("nccid_test", "EfficientNet-B1"): [[512, 10], [3, 191]],
    ("covidx_ct_3a", "test"): [[14554, 457, 2911], [57, 7460, 448], [168, 365, 7361]],
    ("covidx_ct_3a", "val, best epoch (4)"): [[7631, 306, 210], [87, 7862, 198], [668, 1082, 6397]],
    ("covidnet_ct_1", "CT-1 L: resnet50"): [[9450, 0, 0], [58, 7324, 13], [1, 116, 4229]],
    ("covidnet_ct_1", "CT-1 S: efficientnet_lite0"): [[9430, 20, 0], [53, 7334, 8], [8, 224, 4114]],
    ("covidnet_ct_2a", "CT-2 L: resnet50"): [[12128, 5, 112], [45, 7262, 88], [23, 208, 5787]],
    ("covidnet_ct_2a", "CT-2 S: efficientnet_lite0"): [[12109, 5, 131], [52, 7256, 87], [39, 220, 5759]],
    ("ictcf_reports", "EfficientNetV2B0"): [[963, 3, 32], [11, 854, 35], [38, 2, 860]],
    ("ictcf_reports", "EfficientNetV2B1"): [[981, 0, 17], [66, 797, 37], [54, 2, 844]],
    ("ictcf_reports", "EfficientNetV2B2"): [[909, 78, 11], [8, 869, 23], [17, 15, 868]],
    ("ictcf_reports", "ConvNeXtTiny"): [[304, 0, 694], [4, 2, 894], [0, 0, 900]],
    ("ictcf_reports", "ConvNeXtSmall"): [[951, 43, 4], [0, 899, 1], [24, 96, 780]],
    ("ictcf_reports", "ConvNeXtBase"): [[966, 27, 5], [0, 891, 9], [29, 44, 827]],
    ("ictcf_reports", "ResNet50V2"): [[958, 10, 30], [16, 851, 33], [21, 11, 868]],
    ("ictcf_reports", "ResNet101V2"): [[992, 4, 2], [85, 807, 8], [92, 8, 800]],
    ("ictcf_reports", "ResNet152V2"): [[728, 266, 4], [0, 895, 5], [4, 865, 31]],
}
# What does not agree in the studies themselves: table, row, column and what the matrix gives.
DIFFER = {
    ("covidx_ct_3a", "test", "Normal F1"): 0.8901,
    ("covidx_ct_3a", "val, best epoch (4)", "Normal F1"): 0.9231,
}


def numbers(text):
    """[value] of a string of printed numbers."""
    return np.array([printed.number(part)[0] for part in printed.several(text)], float)


def from_matrix(matrix, classes):
    """{metric name: value} of a confusion matrix."""
    matrix = np.array(matrix)
    hits, true, taken = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    rates = {"precision": hits / taken, "recall": hits / true, "f1": 2 * hits / (true + taken)}
    found = {"accuracy": hits.sum() / true.sum()}
    for name, values in rates.items():
        found[f"{name}_macro"] = values.mean()
        found[f"{name}_weighted"] = (values * true).sum() / true.sum()
        found |= {f"per_class.{label}.{name}": value for label, value in zip(classes, values, strict=True)}
    p, r = found["precision_macro"], found["recall_macro"]
    return found | {"study.f1_macro_harmonic": 2 * p * r / (p + r)}


def in_row(table, row):
    return [cell for cell in TABLES[table].cells if cell.row == row]


def classes_of(cell):
    return datasets.classes(load(cell.experiment).data.dataset)


@pytest.mark.parametrize(("table", "row"), MATRICES)
def test_numbers_are_those_of_their_confusion_matrix(table, row):
    cells, matrix = in_row(table, row), MATRICES[table, row]
    assert cells
    assert tuple(np.sum(matrix, 1)) == TABLES[table].counts[cells[0].split]
    wanted = from_matrix(matrix, classes_of(cells[0]))
    compared = 0
    for cell in cells:
        if cell.name not in wanted or cell.published is None:
            continue
        compared += 1
        # The reports of iCTCF are of probabilities, its matrices of rounded ones.
        slack = 0.015 if table == "ictcf_reports" else cell.slack
        value = cell.published
        if (table, row, cell.column) in DIFFER:
            assert abs(value - wanted[cell.name]) > slack
            value = DIFFER[table, row, cell.column]
        assert value == pytest.approx(wanted[cell.name], abs=slack + 1e-9), cell.column
    assert compared >= 7


@pytest.mark.parametrize("row", ictcf.MODELS)
def test_ictcf_accuracies_are_counts(row):
    accuracy, _, val, rounded = numbers(ictcf.SCORES[row])
    for value, images in ((accuracy, 2798), (val, 5596)):
        assert abs(round(value * images) / images - value) <= 0.5e-4
    matrix = np.array(MATRICES["ictcf_reports", row])
    assert rounded == pytest.approx(matrix.trace() / 2798, abs=0.5e-4)
    recalls = [numbers(text)[1] for text in ictcf.REPORTS[row][:3]]
    assert np.dot(recalls, (998, 900, 900)) / 2798 == pytest.approx(accuracy, abs=0.005)


def test_ct_cov19_reports_agree_with_themselves():
    support = np.array(ct_cov19.COUNTS["val"])
    for row, lines in ct_cov19.REPORTS.items():
        for (whole, *classes), option in zip(lines, ct_cov19.OPTIONS, strict=True):
            where = f"{row}, {option}"
            weighted, accuracy, macro = numbers(whole)
            precision, recall, f1 = np.stack([numbers(text) for text in classes], axis=1)
            # Printed to two digits, each is off by 0.005 at most.
            assert np.dot(f1, support) / support.sum() == pytest.approx(weighted, abs=0.00506), where
            assert np.dot(recall, support) / support.sum() == pytest.approx(accuracy, abs=0.0101), where
            assert f1.mean() == pytest.approx(macro, abs=0.0101), where
            for p, r, f in zip(precision, recall, f1, strict=True):
                lower, upper = (max(p - 0.005, 0), max(r - 0.005, 0)), (p + 0.005, r + 0.005)
                low, high = (2 * a * b / max(a + b, 1e-9) for a, b in (lower, upper))
                assert low - 0.0051 <= f <= high + 0.0051, where


def test_ct_cov19_grid_agrees_with_the_reports_and_the_headline():
    differ = []
    for row, lines in ct_cov19.GRID.items():
        grid = {
            f"{stage}-{option}": value
            for stage, text in zip(ct_cov19.STAGES, lines, strict=True)
            for option, value in zip(ct_cov19.OPTIONS, numbers(text), strict=True)
        }
        for option, (whole, *_) in zip(ct_cov19.OPTIONS, ct_cov19.REPORTS[row], strict=True):
            if abs(grid[f"lungs-{option}"] - numbers(whole)[0]) > 0.5e-3 + 1e-9:
                differ.append((row, option))
        column, headline = ct_cov19.HEADLINE[row]
        val_f1, val_auc, *_ = numbers(headline)
        assert max(grid, key=grid.get) == column, row  # the study chose by val F1
        assert grid[column] == val_f1
        stage, _, option = column.partition("-")
        if stage == "lungs" and option in ct_cov19.OPTIONS:
            area = numbers(ct_cov19.AUC[row])[list(ct_cov19.OPTIONS).index(option)]
            assert area == pytest.approx(val_auc, abs=0.5e-3)
    assert differ == [("Small", "classw")]  # .7516 in the report, .751 in the grid


def test_largets_row_is_tinys_network_and_the_note_gives_their_noise():
    tiny, large = (np.concatenate([numbers(text) for text in ct_cov19.GRID[row]]) for row in ("Tiny", "LargeT"))
    assert np.abs(tiny - large).mean() == pytest.approx(0.044, abs=0.0005)
    assert np.abs(tiny - large).max() == pytest.approx(0.158)
    runs = {cell.row: cell.experiment for cell in TABLES["ct_cov19_val"].cells if cell.column == "original-baseline"}
    assert "model=cbr_larget_study," in runs["LargeT"]
    assert "model=cbr_larget," in runs["LargeT of the paper"]


def test_covidnet_page_prints_the_rounded_numbers():
    page = {"CT-1 L": (0.991, 0.973), "CT-1 S": (0.985, 0.947), "CT-2 L": (0.981, 0.962), "CT-2 S": (0.979, 0.957)}
    for name, (accuracy, sensitivity) in page.items():
        assert numbers(covidnet_ct.PAGE[name][0])[0] == accuracy
        assert numbers(covidnet_ct.PAGE[name][3])[0] == pytest.approx(sensitivity, abs=0.0005)


def test_covidx_rates_are_of_the_split_that_the_table_says():
    # Recall times support over precision is how often a class was predicted; that sums to the number of images.
    for table, row, split in (
        ("covidx_ct_3a", "test, repeat run", "test"),
        ("covidx_ct_2a", "val, last epoch (3)", "val"),
    ):
        cells = {cell.name: cell for cell in in_row(table, row)}
        rates = {
            rate: np.array([cells[f"per_class.{label}.{rate}"].published for label in classes_of(cells["accuracy"])])
            for rate in ("precision", "recall", "f1")
        }
        support = np.array(TABLES[table].counts[split])
        assert (rates["recall"] * support / rates["precision"]).sum() == pytest.approx(support.sum(), abs=5)
        assert np.dot(rates["recall"], support) / support.sum() == pytest.approx(cells["accuracy"].published, abs=1e-4)
        harmonic = 2 * rates["recall"] * rates["precision"] / (rates["recall"] + rates["precision"])
        np.testing.assert_allclose(rates["f1"], harmonic, atol=1.1e-4)
        assert cells["accuracy"].split == split
    # The 2A numbers are not of test, as its README seems to say.
    support = np.array(TABLES["covidx_ct_2a"].counts["test"])
    assert abs((rates["recall"] * support / rates["precision"]).sum() - support.sum()) > 50


def test_supports_sum_to_the_published_totals():
    sums = {(name, split): sum(counts) for name, table in TABLES.items() for split, counts in table.counts.items()}
    for place, total in {
        ("nccid_test", "test"): 716,
        ("ct_cov19_test", "val"): 1341,
        ("ct_cov19_test", "test"): 1876,
        ("ictcf_test", "test"): 2798,
        ("covid_xray", "test"): 1573,
        ("covidx_ct_3a", "test"): 33781,
        ("covidx_ct_3a", "val"): 24441,
        ("covidx_ct_2a", "test"): 25658,
        ("covidnet_ct_1", "test"): 21191,
        ("covidnet_ct_2a", "test"): 25658,
    }.items():
        assert sums[place] == total


def test_every_table_has_its_cells():
    assert {name: len(table.cells) for name, table in TABLES.items()} == CELLS
    for name, table in TABLES.items():
        assert table.name == name
        assert table.notes
        assert len({(cell.row, cell.column, cell.metric) for cell in table.cells}) == len(table.cells)
        if table.chosen_from:
            assert set(table.rows) <= set(TABLES[table.chosen_from].rows)


@pytest.mark.parametrize("name", TABLES)
def test_every_experiment_loads_and_has_the_metrics(name):
    loaded = {text: load(text) for text in {cell.experiment for cell in TABLES[name].cells}}
    for config in loaded.values():
        configs.check(config)
        # The official splits of COVIDx CT-2A are the clean ones: `study` there is another study's resampling.
        if name not in ("transfusion", "covidnet_ct_2a"):
            assert config.data.protocol == "study"
    # Runs lie in folders by this name: two experiments must not share one.
    assert len({config.name for config in loaded.values()}) == len(loaded)
    for text in loaded:
        classes = datasets.classes(loaded[text].data.dataset)
        assert all(len(counts) == len(classes) for counts in TABLES[name].counts.values())
        level = metrics.summarize(np.arange(len(classes)), np.eye(len(classes)), classes)
        known = {key for key, value in level.items() if isinstance(value, float)} | {f"study.{key}" for key in STUDY}
        known |= {f"per_class.{label}.{rate}" for label in classes for rate in metrics.PER_CLASS}
        assert {cell.name for cell in TABLES[name].cells if cell.experiment == text} <= known


def test_cells_of_one_experiment_share_its_name_over_all_tables():
    loaded = {cell.experiment for table in TABLES.values() for cell in table.cells}
    names = [load(text).name for text in loaded]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "value", "decimals"),
    [(".966", 0.966, 3), ("96.6%", 0.966, 3), ("90.00%", 0.9, 4), ("1", 1.0, 2), ("5.2392", 5.2392, 4), ("-", None, 2)],
)
def test_printed_numbers(text, value, decimals):
    assert printed.number(text) == (value, decimals)


def test_mistakes_in_printed_numbers_are_named():
    with pytest.raises(ValueError, match="'.9o' is no printed number"):
        printed.number(".9o")
    with pytest.raises(ValueError, match="has 2 numbers for 3 columns"):
        printed.report("row", "experiment", "test.slice", ("a",), (".1/.2",))
    with pytest.raises(ValueError, match="rates are written in 0..1"):
        printed.cell("row", "column", "experiment", "test.slice.accuracy", "1.2")
    assert printed.cell("row", "column", "experiment", "test.slice.loss", "1.2").published == 1.2


def test_tables_do_not_import_jax():
    code = "import sys; import lungjax.tables.published; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
