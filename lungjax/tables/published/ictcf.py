"""iCTCF with non-informative slices: nine networks, as printed by kaclewtak's notebook."""

from lungjax.tables.cells import Table
from lungjax.tables.published.printed import line, report

CLASSES = ("nCT", "pCT", "niCT")
SOURCE = "https://github.com/kaclewtak/Classifying-CT-Scans-for-COVID-19-Classification"
COUNTS = {"test": (998, 900, 900)}

MODELS = {
    "EfficientNetV2B0": "efficientnetv2_b0",
    "EfficientNetV2B1": "efficientnetv2_b1",
    "EfficientNetV2B2": "efficientnetv2_b2",
    "ConvNeXtTiny": "convnext_tiny",
    "ConvNeXtSmall": "convnext_small",
    "ConvNeXtBase": "convnext_base",
    "ResNet50V2": "resnet50v2",
    "ResNet101V2": "resnet101v2",
    "ResNet152V2": "resnet152v2",
}

# Test accuracy, test loss, val accuracy of the last epoch (whose weights were tested), and the accuracy of the drawn
# confusion matrix, which is of probabilities rounded to whole numbers.
SCORES = {
    "EfficientNetV2B0": ".9575/.1766/.9680/.9568",
    "EfficientNetV2B1": ".9367/.1856/.9392/.9371",
    "EfficientNetV2B2": ".9460/.1639/.9421/.9457",
    "ConvNeXtTiny": ".4310/5.2392/.4410/.4310",
    "ConvNeXtSmall": ".9410/.1809/.9307/.9400",
    "ConvNeXtBase": ".9596/.1280/.9660/.9593",
    "ResNet50V2": ".9571/.1206/.9657/.9568",
    "ResNet101V2": ".9299/.1838/.9339/.9289",
    "ResNet152V2": ".5911/3.0552/.5783/.5911",
}

# Test reports: precision/recall/F1 of each of CLASSES, and their AUCs.
REPORTS = {
    "EfficientNetV2B0": (".96/.96/.96", ".99/.95/.97", ".93/.96/.94", ".99/1.00/.99"),
    "EfficientNetV2B1": (".90/.98/.94", "1/.89/.94", ".93/.94/.94", ".99/.99/.99"),
    "EfficientNetV2B2": (".98/.91/.94", ".90/.97/.93", ".96/.97/.96", "1.00/.99/1.00"),
    "ConvNeXtTiny": (".99/.30/.47", "1/.0022/.0044", ".36/1/.53", ".96/.96/.98"),
    "ConvNeXtSmall": (".99/.95/.97", ".86/1/.92", ".99/.87/.93", "1.00/1.00/1.00"),
    "ConvNeXtBase": (".97/.97/.97", ".92/.99/.96", ".98/.92/.95", "1.00/1.00/1.00"),
    "ResNet50V2": (".97/.96/.96", ".98/.95/.96", ".93/.97/.95", "1.00/1.00/1.00"),
    "ResNet101V2": (".85/.99/.92", ".99/.90/.94", ".98/.89/.94", "1.00/1.00/1.00"),
    "ResNet152V2": (".99/.73/.84", ".44/.99/.61", ".78/.034/.066", ".97/.92/.99"),
}

NOTES = (
    "The study filled its small classes with rotated and shifted copies before it drew the splits, so copies of a "
    "slice lie on both sides, and so do neighbouring slices: all numbers are optimistic.",
    "Val and test hold generated images; their balance is not that of the patients (51/20/29 %).",
    "The last of 10 epochs was tested, on unstable val curves. The best epoch would have changed ConvNeXtTiny (val "
    "accuracy .9299) and ResNet152V2 (.8438) completely. ConvNeXt and ResNetV2 got gray levels 0..255 as they are.",
    "The study's own generated images and file order were not published: the draw is alike, and not the same.",
)


def experiment(row: str) -> str:
    """Returns what --experiment names for a row of MODELS."""
    return f"ictcf:model={MODELS[row]},weights=none,protocol=study"


ICTCF_TEST = Table(
    name="ictcf_test",
    title="iCTCF: accuracy and loss of nine networks",
    source=SOURCE,
    counts=COUNTS,
    cells=tuple(
        made
        for row, printed in SCORES.items()
        for made in line(
            row,
            experiment(row),
            (
                ("test accuracy", "test.slice.accuracy"),
                ("test loss", "test.slice.loss"),
                ("val accuracy", "val.slice.accuracy"),
                ("test accuracy, rounded", "test.slice.study.accuracy_rounded"),
            ),
            printed,
        )
    ),
    notes=(
        "'rounded' is of the study's confusion matrices, which it drew from probabilities rounded to 0 or 1 (an image "
        "without any 1 counts as nCT); worked out here from their counts.",
        *NOTES,
    ),
    charts=("bars", "confusions"),
)

ICTCF_REPORTS = Table(
    name="ictcf_reports",
    title="iCTCF: classification reports and AUCs on test",
    source=SOURCE,
    counts=COUNTS,
    cells=tuple(
        made
        for row, (*classes, areas) in REPORTS.items()
        for made in (
            *report(row, experiment(row), "test.slice", CLASSES, classes),
            *line(
                row, experiment(row), [(f"{name} AUC", f"test.slice.per_class.{name}.auc") for name in CLASSES], areas
            ),
        )
    ),
    notes=(
        "The reports are of plain argmax and the study's confusion matrices of rounded probabilities: they differ by "
        "up to .015 in a rate (ConvNeXtSmall: nCT precision .99 here, 951 of 975 in its matrix).",
        "Areas of 1.00 are rounded.",
        *NOTES,
    ),
    charts=("confusions", "curves"),
)

TABLES = (ICTCF_TEST, ICTCF_REPORTS)
