"""NCCID, is the whole lung in view? The one run of nhsx/nccid-ct-slice-lung-classification's notebook."""

from lungjax.tables.cells import Table
from lungjax.tables.published.printed import line, report

CLASSES = ("Others", "WholeLung")
EXPERIMENT = "nccid_whole_lung:protocol=study"
ROW = "EfficientNet-B1"
SOURCE = "https://github.com/nhsx/nccid-ct-slice-lung-classification, whole_lung_classifier_demo.ipynb"
COUNTS = {"test": (522, 194)}

NOTES = (
    "The study split by picture; several pictures of a patient are likely, and may lie on both sides, so its numbers "
    "are optimistic. The clean protocol splits by series.",
    "One run, with only the split seeded. Dropout was 0.2 in the run, though the README says 0.3.",
    "The best checkpoint was overwritten by the last one; in this run the last epoch was the best.",
)

NCCID_TEST = Table(
    name="nccid_test",
    title="NCCID, whole lung or other: the test report",
    source=SOURCE,
    counts=COUNTS,
    cells=(
        *report(ROW, EXPERIMENT, "test.slice", CLASSES, (".99/.98/.99", ".95/.98/.97")),
        *line(
            ROW,
            EXPERIMENT,
            (
                ("accuracy", "test.slice.accuracy"),
                ("AUC", "test.slice.per_class.WholeLung.auc"),
                ("macro precision", "test.slice.precision_macro"),
                ("macro recall", "test.slice.recall_macro"),
                ("macro F1", "test.slice.f1_macro"),
                ("weighted precision", "test.slice.precision_weighted"),
                ("weighted recall", "test.slice.recall_weighted"),
                ("weighted F1", "test.slice.f1_weighted"),
            ),
            ".9818/.99584/.97/.98/.98/.98/.98/.98",
        ),
    ),
    notes=("Accuracy is 703 of 716, from the printed confusion matrix; the report rounds it to .98.", *NOTES),
    charts=("confusions", "curves"),
)

NCCID_VAL = Table(
    name="nccid_val",
    title="NCCID, whole lung or other: the last epoch on val",
    source=SOURCE,
    counts=COUNTS,
    cells=line(ROW, EXPERIMENT, (("accuracy", "val.slice.accuracy"), ("loss", "val.slice.loss")), ".9804/.0736"),
    notes=(
        "Val has 716 pictures, whose classes were not printed; the counts of the same run's test are compared.",
        *NOTES,
    ),
)

TABLES = (NCCID_TEST, NCCID_VAL)
