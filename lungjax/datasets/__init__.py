"""Data sets by name: NAME/CONFIGURATION, or a version of one, NAME/CONFIGURATION-STAGE-SIZE.

Each data set has a module with `ABOUT` and `listing(source, config, options)`; `writer.prepare` writes what is listed.
"""

import contextlib
import difflib
import importlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.config import STAGES, nearest
from lungjax.data import prepared
from lungjax.data.prepared import Prepared
from lungjax.datasets.listing import About

PLAIN = ("default", "original")  # a data set's only or usual configuration, left out where a stage follows
LARGEST = 4096  # pixels a side of a stored copy


@dataclass(frozen=True)
class Dataset:
    """How a data set is found and named; the module is `lungjax.datasets.NAME`."""

    default: str  # configuration where the name has none
    configs: tuple[str, ...]  # allowed configurations; () allows any plain name
    drawn: bool = False  # lungjax draws it itself, on first use
    axial: bool = True  # axial CT slices, or maybe: they have stages
    collection: str = ""  # the name by which other data sets give this one as their source


DATASETS: dict[str, Dataset] = {
    "ct_cov19": Dataset("original", ("original",)),
    "nccid_whole_lung": Dataset("default", ("default",), axial=False),
    "ictcf": Dataset("default", ("default", "oversampled")),
    "covid_xray_5k": Dataset("default", ("default",), axial=False),
    "covid_chestxray": Dataset(
        "covid", ("covid", "findings"), axial=False, collection="COVID-19 image data collection"
    ),
    "coronahack": Dataset("default", ("default",), axial=False),
    "covid_ct": Dataset("default", ("default",)),
    "covidx_ct": Dataset("3a", ("1", "2a", "2b", "3a", "3b")),
    "folder": Dataset("default", ()),
    "phantom_ct": Dataset("default", ("default", "tiny"), drawn=True),
}


@dataclass(frozen=True)
class PrepareOptions:
    """What a user may say about the images of a data set."""

    seed: int = 0  # of splits that are made, and of drawn data sets
    source_pattern: str = ""  # regex; its first group over the file name gives the source
    group_pattern: str = ""  # the same for the group (patient)
    classes: tuple[str, ...] = ()  # label order; () sorts the names
    modality: str = ""  # "ct" or "xray" where a folder's images don't say; of CT slices masks of the body are kept
    # DICOM and NIfTI volumes in a folder:
    hu_windows: tuple[tuple[float, float], ...] = ((-600.0, 1500.0),)  # centre and width in HU; three make colours
    plane: str = "axial"  # or coronal, sagittal
    position: str = "all"  # every slice of a volume, or "mid": the one in its middle
    salt: str = ""  # of the hash that stands for a patient id

    def for_folders(self) -> list[str]:
        """Returns the flags given here that only folders of one's own take."""
        usual = PrepareOptions()
        own = [f.name for f in fields(self) if f.name not in ("seed", "salt")]
        given = [name for name in own if getattr(self, name) != getattr(usual, name)]
        return [f"--{'hu_window' if name == 'hu_windows' else name}" for name in given]


@dataclass(frozen=True)
class DatasetName:
    """A data set's name in its parts."""

    base: str  # a key of DATASETS
    config: str
    stage: str = ""  # one of STAGES, "" for the images as they are
    size: tuple[int, int] | None = None  # height, width of the stored copy

    @property
    def full(self) -> str:
        """The name under which it is stored, such as "ct_cov19/lungs" or "covidx_ct/3a-crop-224"."""
        size = "" if self.size is None else "x".join(map(str, dict.fromkeys(self.size)))
        plain = self.config in PLAIN and self.config == DATASETS[self.base].default
        config = "" if plain and self.stage else self.config
        parts = [part for part in (config, self.stage, size) if part]
        return f"{self.base}/{'-'.join(parts)}"


def resolve(name: str) -> tuple[DatasetName, Dataset]:
    """Returns a name such as "covidx_ct", "covidx_ct/3a-224" or "ct_cov19/lungs" in its parts, and its entry.

    Raises ValueError for an unknown data set, configuration or stage, with the nearest names.
    """
    base, _, rest = name.partition("/")
    if base not in DATASETS:
        raise ValueError(f"unknown data set {base!r}; {nearest(base, DATASETS)}")
    entry = DATASETS[base]
    parts, size, stage = rest.split("-") if rest else [], None, ""
    if len(parts) > 1 and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", parts[-1]):
        height, _, width = parts.pop().partition("x")
        size = (int(height), int(width or height))
        if max(size) > LARGEST:
            raise ValueError(f"{name}: stored copies have at most {LARGEST} pixels a side")
    if parts and parts[-1] in STAGES:
        stage = parts.pop()
    config = "-".join(parts) or entry.default
    if parts and not entry.configs and (parts[-1] in STAGES or difflib.get_close_matches(parts[-1], STAGES, 1, 0.8)):
        raise ValueError(f"{name}: {parts[-1]!r} looks like a stage ({', '.join(STAGES)}); one of them may end a name")
    if entry.configs and config not in entry.configs:
        raise ValueError(
            f"unknown configuration {config!r} of {base}; {nearest(config, (*entry.configs, *STAGES))}. A name is "
            "NAME/CONFIGURATION[-STAGE][-SIZE]"
        )
    if stage and not entry.axial:
        raise ValueError(f"{name}: stages are for axial CT slices, which {base} has none of; leave {stage} out")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", config):
        raise ValueError(f"data set {name!r}: the name after {base}/ may hold letters, digits, '_', '-' and '.'")
    return DatasetName(base, config, stage, size), entry


def about(base: str) -> About:
    """Returns what a person must know of the data set `base`, a key of DATASETS."""
    found: About = importlib.import_module(f"lungjax.datasets.{base}").ABOUT
    return found


def describe(data: Prepared, data_dir: Path) -> dict[str, Any]:
    """Returns what a report says of a prepared data set: its `summary`, and `about`, the fields of its `About`.

    Each is None where there is none: folders of one's own have nothing published about them.
    """
    file = prepared.directory(Path(data_dir), data.name) / "summary.json"
    base = resolve(data.name)[0].base
    return {
        "summary": json.loads(file.read_text("utf-8")) if file.exists() else None,
        "about": None if base == "folder" else vars(about(base)),
    }


def classes(name: str) -> tuple[str, ...]:
    """Returns the classes of a data set that need not be here, in label order; () if only its images say (folder).

    Raises ValueError for an unknown name.
    """
    parts, _ = resolve(name)
    found: Any = getattr(importlib.import_module(f"lungjax.datasets.{parts.base}"), "CLASSES", ())
    return tuple(found[parts.config] if isinstance(found, Mapping) else found)


def help_text(name: str) -> str:
    """Returns the help page of a data set. Raises ValueError for an unknown name."""
    parts, entry = resolve(name)
    base, told = parts.base, about(parts.base)
    configs = ", ".join(f"{base}/{config}" for config in entry.configs) or f"{base}/ANY_NAME_OF_YOURS"
    lines = [f"{base}: {told.title}", "", f"Names: {configs} (without one: {base}/{entry.default})", ""]
    stages = f"-STAGE-SIZE, stages {', '.join(STAGES)}" if entry.axial else "-SIZE"
    lines += [f"Versions: {base}/...{stages}", ""]
    lines += ["Where to get it:", told.origin, "", "What the folder must look like:", told.layout, ""]
    for word, text in (("study", told.study), ("clean (the default)", told.clean)):
        if text:
            lines += [f"--set=data.protocol={word}:", text, ""]
    for config, splits in (told.expected or {}).items():
        lines += [f"Published images per class, {base}/{config}:"]
        lines += [f"  {split:<6}{' / '.join(f'{n:,}' for n in counts)}" for split, counts in splits.items()] + [""]
    lines += ["Licence:", told.licence, "", "Cite:", told.citation, ""]
    source = "" if entry.drawn else " --source=FOLDER"
    return "\n".join([*lines, f"python -m lungjax.prepare --dataset={parts.full}{source}"])


def open_dataset(name: str, data_dir: str | Path, protocol: str = "clean") -> Prepared:
    """Opens a prepared data set; one that lungjax draws itself is made on first use.

    Raises ValueError for an unknown name, or with what to get and the command to run if it is not prepared, or
    has no such protocol.
    """
    parts, entry = resolve(name)
    found = prepared.directory(Path(data_dir), parts.full)
    if not prepared.is_prepared(found) and entry.drawn:
        write(parts.full, None, Path(data_dir), PrepareOptions(), keep=True, quiet=True)
    if prepared.is_prepared(found):
        return prepared.load(found, parts.full, protocol)
    command = f"python -m lungjax.prepare --dataset={parts.full} --source=FOLDER --data_dir={data_dir}"
    raise ValueError(f"data set {parts.full} is not prepared in {data_dir}. Get {_origin(parts.base)}. Then: {command}")


def without_lungs(data: Prepared, data_dir: Path) -> Prepared | None:
    """Returns the test images of `data` with their lungs blacked out, as another data set's test split.

    Images in which no lung was found are left out. None where NAME-no_lungs isn't prepared, where `data` is a stage
    itself, whose networks never saw what is around the lungs, and where classes or files differ or no lung was found.
    """
    parts = resolve(data.name)[0] if data.name.partition("/")[0] in DATASETS else None
    name = replace(parts, stage="no_lungs").full if parts and not parts.stage else ""
    if not name or not prepared.is_prepared(prepared.directory(data_dir, name)):
        return None
    dark = prepared.load(prepared.directory(data_dir, name), name)
    tested = np.isin(dark.columns["file"], data.columns["file"][data.rows("test")])
    shown = tested & dark.columns["found"]
    if dark.classes != data.classes or not shown.any():
        print(f"{name} has other classes or files than {data.name}, or no lung was found in any: no control is made")
        return None
    return replace(dark, columns=dark.columns | {"split": np.where(shown, "test", "")})


def write(name: str, source: Path | None, data_dir: Path, options: PrepareOptions, **how: Any) -> dict[str, Any]:
    """Prepares the data set `name` from the folder `source` (None where lungjax draws it).

    `how` goes to `writer.prepare`: window, on_bad_image, on_no_lung, overwrite, keep, quiet. Returns the summary;
    raises ValueError for what is wrong with the name, the folder or an image.
    """
    parts, entry = resolve(name)
    if not entry.drawn and (source is None or not source.is_dir()):
        given = f"--source={source} is no folder" if source else "--source=FOLDER is missing"
        raise ValueError(f"{given}: {parts.full} is made from {_origin(parts.base)}")
    from lungjax.datasets.build import writer  # here: it imports TFDS

    make: Callable[..., Any] = importlib.import_module(f"lungjax.datasets.{parts.base}").listing
    if parts.base == "folder" and not options.salt:
        options = _salted(options, data_dir)
    listing = make(source, parts.config, options)
    return writer.prepare(parts.full, listing, data_dir, stage=parts.stage, size=parts.size, **how)


def _origin(base: str) -> str:
    return f"{about(base).origin.rstrip('.')}; python -m lungjax.prepare --dataset={base} --help says more"


def _salted(options: PrepareOptions, data_dir: Path) -> PrepareOptions:
    """Returns `options` with the salt of this folder's patient hashes, which is drawn once and kept."""
    file = data_dir / ".patient_salt"
    if not file.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        drawn = file.with_name(f"{file.name}.{os.getpid()}")
        drawn.touch(mode=0o600)
        drawn.write_text(secrets.token_hex(16))
        with contextlib.suppress(FileExistsError):  # another process was quicker: its salt counts
            os.link(drawn, file)
        drawn.unlink()
    salt = file.read_text().strip()
    if not salt:
        raise ValueError(f"{file} is empty: without a salt patient ids could be guessed; delete it")
    return replace(options, salt=salt)
