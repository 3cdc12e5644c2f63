"""The model page of COVID-Net CT (haydengunraj/COVIDNet-CT): CT-1 and CT-2, networks L and S."""

from lungjax.tables.cells import Cell, Table
from lungjax.tables.published.printed import columns, line

CLASSES = ("Normal", "Pneumonia", "COVID-19")
SOURCE = "https://github.com/haydengunraj/COVIDNet-CT, docs/models.md"

# What answers a published network here: its graph is not public as code, so it can't be trained again.
STAND_FOR = {"L": ("resnet50", "efficientnetv2_s"), "S": ("efficientnet_lite0",)}

# Accuracy, as the page prints it, then sensitivity/PPV of each class, from the page's confusion matrices.
PAGE = {
    "CT-1 L": ("99.1%", "100.00/99.38%", "99.04/98.44%", "97.31/99.69%"),
    "CT-1 S": ("98.5%", "99.79/99.36%", "99.18/96.78%", "94.66/99.81%"),
    "CT-2 L": ("98.1%", "99.04/99.44%", "98.20/97.15%", "96.16/96.66%"),
    "CT-2 S": ("97.9%", "98.89/99.25%", "98.12/96.99%", "95.70/96.35%"),
}

NOTES = (
    "COVID-Net CT is published as a trained TensorFlow graph and not as code. A row 'CT-2 L: resnet50' holds the "
    "published network's numbers beside those of another network, trained by the official protocol: which is above "
    "the other says something about networks, and nothing about how well the study was repeated.",
    "L has 1,399 thousand parameters and S 448; each network here has more, and ImageNet weights.",
    "Sensitivity and PPV are worked out from the page's confusion matrices. The page scores slices; patients are in "
    "the report of a run.",
)


def _cells(names: tuple[str, ...], version: str) -> tuple[Cell, ...]:
    cells: list[Cell] = []
    for name in names:
        accuracy, *classes = PAGE[name]
        for model in STAND_FOR[name[-1]]:
            row = f"{name}: {model}"
            run = f"covidnet_ct:model={model},version={version},weights=imagenet,protocol=study"
            cells += line(row, run, (("accuracy", "test.slice.accuracy"),), accuracy)
            for label, printed in zip(CLASSES, classes, strict=True):
                (sensitivity, recall), (_, precision) = columns(label, "test.slice", ("recall", "precision"))
                sensitivity = f"{label} sensitivity"
                cells += line(row, run, ((sensitivity, recall), (f"{label} PPV", precision)), printed)
    return tuple(cells)


COVIDNET_CT_1 = Table(
    name="covidnet_ct_1",
    title="COVID-Net CT-1, L and S, on the test split of COVIDx CT-1",
    source=SOURCE,
    counts={"test": (9450, 7395, 4346)},
    cells=_cells(("CT-1 L", "CT-1 S"), "1"),
    notes=NOTES,
    charts=("confusions", "curves"),
)

COVIDNET_CT_2A = Table(
    name="covidnet_ct_2a",
    title="COVID-Net CT-2, L and S, on the test split of COVIDx CT-2A",
    source=SOURCE,
    counts={"test": (12245, 7395, 6018)},
    cells=_cells(("CT-2 L", "CT-2 S"), "2a"),
    notes=(
        "The page's heading calls these numbers '(3A)'. That is wrong: the matrices sum to 25,658, the test split of "
        "2A; nothing was published on 3A.",
        "A third CT-2 L, of radiologist-labelled cases only, has 98.3 % accuracy and 96.4 % COVID-19 sensitivity on "
        "the page; there is no such choice of cases here.",
        *NOTES,
    ),
    charts=("confusions", "curves"),
)

TABLES = (COVIDNET_CT_1, COVIDNET_CT_2A)
