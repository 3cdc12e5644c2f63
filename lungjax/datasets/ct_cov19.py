"""CT-COV19: axial CT slices of three classes with the author's splits.

Source: https://github.com/m2dgithub/CT-COV19 (commit 598e9b8); the study: https://github.com/marta-0/covid-ct.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from lungjax.config import nearest
from lungjax.data import splits
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, differences

CLASSES = ("COV", "Normal", "OtherPneumonia")  # label numbers 0, 1, 2 of the study
SPLITS = {"train": "Train", "val": "Val", "test": "Test"}
TRAIN_TOTAL = 4404  # as the study's notebooks print it; its images per class are not published

ABOUT = About(
    title="axial chest CT slices: COVID-19, normal, other pneumonia",
    origin="https://github.com/m2dgithub/CT-COV19 (7,621 slices, JPEG and PNG, mostly 512 x 512; git clone or its zip)",
    layout=(
        "{Train,Val,Test}/{COV,Normal,OtherPneumonia}/GROUP/FILE, as in the repository; images may also lie directly "
        "in the class folder, as those of Val/OtherPneumonia do."
    ),
    licence="None is stated in the repository: ask its author before you share images or use them commercially.",
    citation="m2dgithub: CT-COV19, https://github.com/m2dgithub/CT-COV19, 2020.",
    study="The splits as shipped. They part neighbouring slices of one scan, and the same file names occur in several.",
    clean=(
        "Test as shipped. A numbered folder of COV is a patient; elsewhere patients are unknown, and blocks of "
        f"{files.BLOCK} consecutive file numbers of a folder stay together. The shipped validation images of "
        "OtherPneumonia are strays from the training folder, so that class's validation part is cut anew, by block. "
        "Groups on both sides of a shipped border and twins stay on the test's side."
    ),
    expected={"original": {"val": (908, 388, 45), "test": (1130, 579, 167)}},
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of the repository folder `source`; `config` is "original".

    Raises ValueError for a missing split or class folder, a folder of no known class, or a folder without images.
    """
    files.refuse_flags(options, "ct_cov19")
    found: list[tuple[str, int, str]] = []  # split, label, path
    for split, name in SPLITS.items():
        folder = files.find(source, (f"{name}/", f"CT-COV19/{name}/", f"CT-COV19-master/{name}/"), f"{split} folder")
        for other in files.folders(folder):
            if other.lower() not in [c.lower() for c in CLASSES]:
                raise ValueError(f"{folder}: the folder {other} is no class; {nearest(other, CLASSES)}")
        for label, known in enumerate(CLASSES):
            inner = files.find(folder, (f"{known}/",), f"folder of class {known}")
            paths = files.pictures(inner)
            if not paths:
                raise ValueError(f"{inner} has no image")
            found += [(split, label, (inner / path).relative_to(source).as_posix()) for path in paths]
    loose = {label for split, label, path in found if _folder(path, label) == ""}
    examples = [
        Example(
            file=path,
            image=str(source / path),
            label=label,
            split=split,
            group=group(path, label, label in loose and split != "test"),
            study=split,
        )
        for split, label, path in found
    ]
    for label in sorted(loose):
        examples = _cut_anew(examples, label, options.seed)
    notes = differences(examples, CLASSES, (ABOUT.expected or {})["original"], "CT-COV19")
    total = Counter(example.study for example in examples)["train"]
    if total != TRAIN_TOTAL:
        notes.append(f"differs from the publication: train has {total:,} images; the study's notebooks print 4,404")
    return Listing(
        CLASSES,
        examples,
        notes=tuple(notes),
        group_name="patients or blocks of neighbouring slices",
        study=ABOUT.study,
        body=True,
    )


def group(path: str, label: int, loose: bool) -> str:
    """Returns what must stay together with a slice: its patient's folder, or its block of file numbers.

    `loose` is for classes whose images were in part taken out of their folders: the folder's name is left out then,
    so that a stray is in one block with its neighbours.
    """
    folder = _folder(path, label)
    if label == 0 and folder.isdigit():
        return f"COV/{folder}"
    parts = [CLASSES[label], "" if loose else folder, files.block(files.stem_of(path))]
    return "/".join(part for part in parts if part)


def _folder(path: str, label: int) -> str:
    """Returns the folder of an image inside its class folder; "" if it lies directly there."""
    parts = path.split("/")[:-1]
    start = [part.lower() for part in parts].index(CLASSES[label].lower())
    return "/".join(parts[start + 1 :])


def _cut_anew(examples: list[Example], label: int, seed: int) -> list[Example]:
    rows = [i for i, e in enumerate(examples) if e.label == label and e.split != "test"]
    whole = splits.SHARES["train"] + splits.SHARES["val"]
    shares = {split: splits.SHARES[split] / whole for split in ("train", "val")}
    made = splits.make_splits([0] * len(rows), [examples[i].group for i in rows], shares, seed)
    for i, split in zip(rows, made, strict=True):
        examples[i] = replace(examples[i], split=split)
    return examples
