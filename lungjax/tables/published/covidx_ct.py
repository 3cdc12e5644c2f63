"""COVIDx CT with frozen torchvision networks, as printed by AbdullahMakhdoom/COVIDNet-CT-Identification."""

from lungjax.tables.cells import Cell, Table
from lungjax.tables.published.printed import line, report

CLASSES = ("Normal", "Pneumonia", "COVID-19")
SOURCE = "https://github.com/AbdullahMakhdoom/COVIDNet-CT-Identification"
RUN_3A = "covidx_ct:model=densenet201,unfreeze=4,version=3a,protocol=study"
RUN_2A = "covidx_ct:model=densenet161,unfreeze=4,version=2a,protocol=study"

NOTES = (
    "The study kept the last epoch's weights and not the best, and so does the study protocol.",
    "Val was balanced by drawing with replacement, so its scores are not comparable with test's, and normalised by "
    "the mean and standard deviation of test (ours by those of train).",
    "The centre crop of 340 x 380 cuts into the lungs of larger images, and the supplied boxes were not used.",
    "Macro F1 is the study's: the harmonic mean of macro precision and macro recall.",
)


def rows(row: str, run: str, split: str, whole: str, classes: tuple[str, ...], loss: str = "-") -> tuple[Cell, ...]:
    """Returns one row: `whole` is accuracy/macro precision/macro recall/macro F1, `classes` P/R/F1 of each class."""
    level = f"{split}.slice"
    return (
        *line(
            row,
            run,
            (
                ("accuracy", f"{level}.accuracy"),
                ("macro precision", f"{level}.precision_macro"),
                ("macro recall", f"{level}.recall_macro"),
                ("macro F1", f"{level}.study.f1_macro_harmonic"),
            ),
            whole,
        ),
        *report(row, run, level, CLASSES, classes),
        *line(row, run, (("loss", f"{level}.loss"),), loss),
    )


def last_epoch(row: str, whole: str) -> tuple[Cell, ...]:
    """Returns the val row of a run's last epoch: accuracy/macro F1."""
    return line(
        row, RUN_3A, (("accuracy", "val.slice.accuracy"), ("macro F1", "val.slice.study.f1_macro_harmonic")), whole
    )


COVIDX_CT_3A = Table(
    name="covidx_ct_3a",
    title="COVIDx CT-3A: DenseNet-201, 4 blocks open, 10 epochs",
    source=f"{SOURCE}, covid_training.ipynb and covid_classification_training.ipynb",
    counts={"val": (8147, 8147, 8147), "test": (17922, 7965, 7894)},
    cells=(
        *rows(
            "test",
            RUN_3A,
            "test",
            "86.96/85.74/89.37/87.52%",
            ("98.48/81.21/89.02%", "90.07/93.66/91.83%", "68.67/93.25/79.09%"),
            ".4813",
        ),
        *rows(
            "test, repeat run",
            RUN_3A,
            "test",
            "88.11/85.95/89.42/87.65%",
            ("97.93/84.98/91.00%", "85.70/94.25/89.77%", "74.21/89.02/80.94%"),
            ".4110",
        ),
        *rows(
            "val, best epoch (4)",
            RUN_3A,
            "val",
            "89.56/90.00/89.56/89.78%",
            ("91.00/93.67/92.32%", "84.99/96.50/90.38%", "94.00/78.52/85.57%"),
            ".3236",
        ),
        *last_epoch("val, last epoch", "87.53/87.92%"),
        *line("val, repeat run, last epoch", RUN_3A, (("accuracy", "val.slice.accuracy"),), "88.66%"),
    ),
    notes=(
        "One experiment, which the study ran twice: its two test accuracies are 1.15 points apart.",
        "F1 of Normal is printed as 89.02 on test and 92.32 on val, from rounded parts; the confusion matrices give "
        "89.01 and 92.31.",
        "Ours on val are of the last epoch in every row; 'best epoch' is what the study saw on its way.",
        *NOTES,
    ),
    charts=("confusions", "curves"),
)

COVIDX_CT_2A = Table(
    name="covidx_ct_2a",
    title="COVIDx CT-2A: DenseNet-161, 4 blocks open, 3 epochs, on val",
    source=f"{SOURCE}, README and covidct-2a.ipynb",
    counts={"val": (6244, 6244, 6244), "test": (12245, 7395, 6018)},
    cells=rows(
        "val, last epoch (3)",
        RUN_2A,
        "val",
        "95.30/95.38/95.30/95.34%",
        ("97.71/97.69/97.70%", "92.28/97.66/94.89%", "96.14/90.55/93.26%"),
        ".1855",
    ),
    notes=(
        "The README shows these as its result. They are of the balanced val, not of test: 95.30 is the mean of the "
        "three recalls, and the third epoch's val accuracy; on 2A's test counts the same recalls would make 96.0.",
        "Whether the weight file that the notebook started from held ImageNet weights is not known.",
        *NOTES,
    ),
    charts=("confusions", "curves"),
)

TABLES = (COVIDX_CT_3A, COVIDX_CT_2A)
