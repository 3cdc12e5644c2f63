"""CT-COV19 (commit 598e9b8): axial CT slices with the author's splits; study: https://github.com/marta-0/covid-ct."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from lungjax.config import nearest
from lungjax.data import splits
from lungjax.data.folder_walk import is_hidden
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, compare_counts, complete_splits

CLASSES = ("COV", "Normal", "OtherPneumonia")  # labels 0, 1, 2 of the study
TRAIN_TOTAL = 4404  # as printed in the study's notebooks; its images per class are not published

ABOUT = About(
    title="axial chest CT slices: COVID-19, normal, other pneumonia",
    origin="https://github.com/m2dgithub/CT-COV19 (7,621 slices, JPEG and PNG, mostly 512 x 512; git clone or zip)",
    layout="{Train,Val,Test}/{COV,Normal,OtherPneumonia}/GROUP/FILE, as in the repository; images may also be "
    "directly in the class folder, as in Val/OtherPneumonia.",
    licence="The repository states none: ask its author before you share images or use them commercially.",
    citation="m2dgithub: CT-COV19, https://github.com/m2dgithub/CT-COV19, 2020.",
    study="The original splits. They divide neighboring slices of a scan; some file names occur in several splits.",
    clean="The original test split. A numbered folder of COV is a patient; elsewhere patients are unknown, and blocks "
    f"of {files.BLOCK_SIZE} consecutive file numbers of a folder stay together. The original val images of "
    "OtherPneumonia were taken from the train folder, so val of this class is made anew, by block.",
    expected={"original": {"val": (908, 388, 45), "test": (1130, 579, 167)}},
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of the repository folder `source`; `config` is "original".

    Raises ValueError for a missing split or class folder, an unknown class, and a class without images.
    """
    images: list[tuple[str, int, Path, str]] = []  # split, label, path, path below the class folder
    for split in splits.SPLITS:
        name = split.capitalize()
        folder = files.find(source, (f"{name}/", f"CT-COV19/{name}/", f"CT-COV19-master/{name}/"), f"{split} folder")
        for other in sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)):
            if other.lower() not in [c.lower() for c in CLASSES]:
                raise ValueError(f"{folder}: unknown class folder {other}; {nearest(other, CLASSES)}")
        for label, name in enumerate(CLASSES):
            images += [(split, label, path, inner) for path, inner in files.class_images(folder, name)]
    flat = {label for _, label, _, inner in images if "/" not in inner}
    examples = [
        Example(
            file=path.relative_to(source).as_posix(),
            image=str(path),
            label=label,
            split=split,
            group=group(inner, label, label in flat and split != "test"),
            study=split,
        )
        for split, label, path, inner in images
    ]
    for label in sorted(flat):
        merged = [replace(e, split="test" if e.split == "test" else "train") for e in examples if e.label == label]
        resplit = {e.file: e for e in complete_splits(merged, options.seed)[0]}  # val is taken from train again
        examples = [resplit.get(e.file, e) for e in examples]
    notes = compare_counts(examples, CLASSES, ABOUT.expected["original"], "CT-COV19")
    total = Counter(example.study for example in examples)["train"]
    if total != TRAIN_TOTAL:
        notes.append(f"differs from the publication: train has {total:,} images, in the study's notebooks 4,404")
    name = "patients or blocks of neighboring slices"
    return Listing(CLASSES, examples, notes=tuple(notes), group_name=name, study=ABOUT.study, body=True)


def group(path: str, label: int, flat: bool) -> str:
    """Returns the group of a slice by its path below the class folder: its patient, or its block of file numbers.

    `flat` ignores the folder, for classes with images outside their original folders: each is in one block with its
    neighbors.
    """
    folder = path.rpartition("/")[0]
    if label == 0 and folder.isdigit():
        return f"COV/{folder}"
    parts = [CLASSES[label], "" if flat else folder, files.block(Path(path).stem)]
    return "/".join(part for part in parts if part)
