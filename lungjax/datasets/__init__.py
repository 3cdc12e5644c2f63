"""Data sets by name. Each has a file with `Builder` (TFDS) and `listing(source, config, options)`."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungjax.config import nearest
from lungjax.data import prepared
from lungjax.data.prepared import Prepared


@dataclass(frozen=True)
class Dataset:
    """How a data set is found, named and got."""

    module: str  # holds Builder and listing
    default: str  # configuration where the name has none
    configs: tuple[str, ...]  # allowed configurations; () allows any plain name
    origin: str  # where the images come from and how big they are, for errors; "" if drawn by lungjax


DATASETS: dict[str, Dataset] = {
    "covidx_ct": Dataset(
        "lungjax.datasets.covidx_ct",
        "3a",
        ("1", "2a", "2b", "3a", "3b"),
        "https://www.kaggle.com/datasets/hgunraj/covidxct (1: 104,009 slices, 2a: 194,922, 3a: 425,024, "
        "roughly 0.15 MB each, so up to about 65 GB, and as much again once prepared; 2b and 3b must be "
        "built from their sources)",
    ),
    "folder": Dataset(
        "lungjax.datasets.folder",
        "default",
        (),
        "your own images: a folder with labels.csv (path,label[,split,group,source]), "
        "{train,val,test}/{class}/... or {class}/...; the prepared copy is about as big as the folder",
    ),
    "phantom_ct": Dataset("lungjax.datasets.phantom_ct", "default", ("default", "tiny"), ""),
}


@dataclass(frozen=True)
class Options:
    """What a user may say about the images of a data set."""

    seed: int = 0  # of splits that are made, and of drawn data sets
    source_pattern: str = ""  # regex; its first group over the file name gives the source
    group_pattern: str = ""  # the same for the group (patient)
    classes: tuple[str, ...] = ()  # label order; () sorts the names


def resolve(name: str) -> tuple[str, Dataset]:
    """Returns the full name, such as "covidx_ct/3a" for "covidx_ct", and its entry.

    Raises ValueError for an unknown data set or configuration, with the nearest names.
    """
    base, _, config = name.partition("/")
    if base not in DATASETS:
        raise ValueError(f"unknown data set {base!r}; {nearest(base, DATASETS)}")
    entry = DATASETS[base]
    config = config or entry.default
    if entry.configs and config not in entry.configs:
        raise ValueError(f"unknown configuration {config!r} of {base}; {nearest(config, entry.configs)}")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", config):
        raise ValueError(f"data set {name!r}: the name after {base}/ may hold letters, digits, '_', '-' and '.'")
    return f"{base}/{config}", entry


def open_dataset(name: str, data_dir: str | Path) -> Prepared:
    """Opens a prepared data set; one that lungjax draws itself is made on first use.

    Raises ValueError for an unknown name, or with what to get and the command to run if it is not prepared.
    """
    full, entry = resolve(name)
    found = _directory(Path(data_dir), full)
    if found is None and not entry.origin:
        write(full, None, Path(data_dir), Options(), keep=True, quiet=True)
        found = _directory(Path(data_dir), full)
    if found is None:
        raise ValueError(
            f"data set {full} is not prepared in {data_dir}. Get {entry.origin}. Then run: "
            f"python -m lungjax.prepare --dataset={full} --source=FOLDER --data_dir={data_dir}"
        )
    return prepared.load(found, full)


def write(name: str, source: Path | None, data_dir: Path, options: Options, **how: Any) -> dict[str, Any]:
    """Prepares the data set `name` from the folder `source` (None where lungjax draws it).

    `how` goes to `records.prepare`: window, on_bad_image, overwrite, keep, quiet. Returns the summary; raises
    ValueError for what is wrong with the name, the folder or an image.
    """
    full, entry = resolve(name)
    if entry.origin and (source is None or not source.is_dir()):
        given = f"--source={source} is no folder" if source else "--source=FOLDER is missing"
        raise ValueError(f"{given}: {full} is made from {entry.origin}")
    from lungjax.datasets import records  # here: it imports TFDS

    module = importlib.import_module(entry.module)
    make: Callable[..., Any] = module.listing
    listing = make(source, full.partition("/")[2], options)
    return records.prepare(module.Builder, full, listing, data_dir, **how)


def _directory(data_dir: Path, full: str) -> Path | None:
    done = [path for path in (data_dir / full).glob("[0-9]*.*.*") if prepared.is_prepared(path)]
    return max(done, key=lambda path: [int(part) for part in path.name.split(".") if part.isdigit()], default=None)
