"""CT-COV19 (commit 598e9b8): axial CT slices with the author's splits; study: https://github.com/marta-0/covid-ct."""

import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lungjax.config import nearest
from lungjax.data import splits
from lungjax.data.folder_walk import is_hidden
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

CLASSES = ("COV", "Normal", "OtherPneumonia")  # labels 0, 1, 2 of the study
SCAN = "FILE001"  # prefix of the files of a folder with one scan, before the number of the slice
GAP = 10  # as in about.toml: file numbers of two scans are at least 18 apart, those of one scan at most 3
LONGEST = 60  # numbers in a group, as in about.toml: runs have up to 56 (Test/OtherPneumonia), except in Normal
TRAIN_TOTAL = 4404  # as printed in the study's notebooks; its images per class are not published

ABOUT = files.about("ct_cov19")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of a repository. Raises ValueError for missing folders or images, or an unknown class."""
    images: list[tuple[str, int, Path, str]] = []  # split, label, path, path below the class folder
    for split in splits.SPLITS:
        name = split.capitalize()
        folder = files.find(source, (f"{name}/", f"CT-COV19/{name}/", f"CT-COV19-master/{name}/"), f"{split} folder")
        for other in sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)):
            if other.lower() not in [c.lower() for c in CLASSES]:
                raise ValueError(f"{folder}: unknown class folder {other}; {nearest(other, CLASSES)}")
        for label, name in enumerate(CLASSES):
            images += [(split, label, path, inner) for path, inner in files.class_images(folder, name)]
    # Images directly in a class folder were moved there from other folders and belong to a series with their neighbors.
    flat = {label for _, label, _, inner in images if "/" not in inner}
    series: dict[str, list[Path]] = defaultdict(list)
    for split, label, path, inner in images:
        moved = label in flat and split != "test"
        folder = Path(inner if label else f"{split}/{inner}").parent  # two COV folders of one number are two scans
        series[str(Path(CLASSES[label], "" if moved else folder))].append(path)
    group = {path: f"{name}/{run}" for name, paths in series.items() for path, run in runs(paths).items()}
    examples = [
        Example(path.relative_to(source).as_posix(), str(path), label, split, group[path], study=split)
        for split, label, path, _ in images
    ]
    for label in sorted(flat):
        merged = [replace(e, split="test" if e.split == "test" else "train") for e in examples if e.label == label]
        resplit = {e.file: e for e in complete_splits(merged, options.seed)[0]}  # val is taken from train again
        examples = [resplit.get(e.file, e) for e in examples]
    notes = compare_counts(examples, CLASSES, ABOUT.expected["original"], "CT-COV19")
    total = Counter(example.study for example in examples)["train"]
    if total != TRAIN_TOTAL:
        notes.append(f"differs from the publication: train has {total:,} images, but 4,404 in the study's notebooks")
    return Listing(CLASSES, examples, (), tuple(notes), "scans or runs of slices", ABOUT.study, body=True)


def runs(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns the group of each file of a series: SCAN for files of that name, or else the run of file numbers."""
    scan = {path: SCAN for path in paths if path.stem.startswith(SCAN)}
    prefixes = {path: path.stem.rstrip(string.digits) for path in paths if path not in scan}
    numbers = {path: (prefix, int(path.stem.removeprefix(prefix) or 0)) for path, prefix in prefixes.items()}
    return files.runs(numbers, GAP, LONGEST) | scan
