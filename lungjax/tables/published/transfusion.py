"""Transfusion (Raghu et al., NeurIPS 2019): random start against ImageNet weights, by size of the network."""

from lungjax.tables.cells import Table
from lungjax.tables.published.printed import cell, several

UNCONFIRMED = "The published value is from memory, unconfirmed."
DATASET = "coronahack"  # chest X-rays, which the paper's second data set are as well

# AUC on Retina, random/ImageNet, in the paper's order of size; the network here, whose ImageNet weights are public or
# have to be made first; and whether the number was confirmed.
ROWS = {
    "ResNet-50": ("resnet50", "96.4/96.7%", ""),
    "CBR-LargeT": ("cbr_larget", "96.2/96.2%", ""),
    "CBR-LargeW": ("cbr_largew", "95.8/95.8%", UNCONFIRMED),
    "CBR-Small": ("cbr_small", "95.7/95.8%", UNCONFIRMED),
    "CBR-Tiny": ("cbr_tiny", "95.8/95.8%", UNCONFIRMED),
}
PUBLIC = ("resnet50",)


def experiment(model: str, start: str) -> str:
    """Returns what --experiment names for a network and a start, "random" or "imagenet".

    The authors' ImageNet weights of the CBR networks are not public: theirs start from the run that the experiment
    imagenet_pretrain leaves.
    """
    if start == "imagenet" and model not in PUBLIC:
        start = f"run:runs/imagenet_pretrain_{model}"
    return f"transfusion:model={model},start={start},dataset={DATASET}"


TRANSFUSION = Table(
    name="transfusion",
    title="Transfusion: AUC from a random start and from ImageNet weights",
    source="Raghu et al.: Transfusion, NeurIPS 2019, arXiv 1902.07208, table 1",
    elsewhere=(
        "the published numbers are of Retina, about 250,000 photographs of the eye that are not public; ours are of "
        f"the chest X-rays of {DATASET}"
    ),
    cells=tuple(
        cell(row, start, experiment(model, start), "test.slice.auc_macro", text, note)
        for row, (model, printed, note) in ROWS.items()
        for start, text in zip(("random", "imagenet"), several(printed), strict=True)
    ),
    notes=(
        "What can be compared is the difference between the two columns, and between large and small networks.",
        "Inception-v3 (96.6 and 96.7 in the paper) is not among the networks here.",
        "With 5,000 images ResNet-50 gained more, 92.2 to 94.6, and CBR-LargeT went from 93.6 to 93.9; "
        "--set=train.fraction=... draws such a curve.",
        "The paper's CBR-Tiny has 1,076,480 parameters by the count remembered, which does not fit its definition "
        "(5x5, 64-128-256-512: 4.3 million); the definition is what runs here.",
        "For ImageNet weights of a CBR network: ./run.sh --experiment=imagenet_pretrain:model=cbr_small",
    ),
    charts=("bars",),
)

TABLES = (TRANSFUSION,)
