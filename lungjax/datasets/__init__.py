"""Data sets by name: NAME/CONFIGURATION, or a preprocessed copy, NAME/CONFIGURATION-STAGE-SIZE.

Each data set has a module with `ABOUT` and `listing(source, config, options)`, whose images `build.writer` writes.
"""

import contextlib
import difflib
import importlib
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.config import STAGES, nearest
from lungjax.data import prepared, summary
from lungjax.data.imaging.limits import DEFAULT, Limits
from lungjax.data.prepared import Prepared
from lungjax.datasets.listing import About

PLAIN_CONFIGS = ("default", "original")  # omitted from the name of a stage if it is the default
SALT_FILE = ".patient_salt"  # in the folder of prepared data sets
MAX_SIDE = 4096  # pixels of a stored copy


@dataclass(frozen=True)
class Dataset:
    """Registry entry of a data set; its module is `lungjax.datasets.NAME`."""

    default: str  # configuration if a name contains none
    configs: tuple[str, ...]  # allowed configurations; () allows any plain name
    synthetic: bool = False  # drawn by lungjax on first use
    axial: bool = True  # may contain axial CT slices, which have stages
    modality: str = "ct"  # "xray", or "" if each prepared copy records its own
    collection: str = ""  # name as a source in other data sets


DATASETS: dict[str, Dataset] = {
    "ct_cov19": Dataset("original", ("original",)),
    "nccid_whole_lung": Dataset("default", ("default",), axial=False),
    "ictcf": Dataset("default", ("default", "oversampled")),
    "covid_xray_5k": Dataset("default", ("default", "oversampled"), axial=False, modality="xray"),
    "covid_chestxray": Dataset(
        "covid", ("covid", "findings"), axial=False, modality="xray", collection="COVID-19 image data collection"
    ),
    "coronahack": Dataset("default", ("default",), axial=False, modality="xray"),
    "nih_chestxray14": Dataset("default", ("default",), axial=False, modality="xray", collection="NIH ChestX-ray14"),
    "chexpert": Dataset("default", ("default", "competition"), axial=False, modality="xray", collection="CheXpert"),
    "medmnist": Dataset(
        "pneumonia",
        tuple(name + size for name in ("pneumonia", "chest", "organa") for size in ("", "_64", "_128", "_224")),
        axial=False,
        modality="",
    ),
    "covid_ct": Dataset("default", ("default",)),
    "covidx_ct": Dataset("3a", ("1", "2a", "2b", "3a", "3b")),
    "folder": Dataset("default", (), modality=""),
    "phantom_ct": Dataset("default", ("default", "tiny", "findings"), synthetic=True),
}


@dataclass(frozen=True)
class PrepareOptions:
    """The user's options for listing a data set; all except `seed` and `limits` apply only to `folder`."""

    seed: int = 0  # of new splits and synthetic data sets
    source_pattern: str = ""  # regex, searched in the file name; its first group is the source
    group_pattern: str = ""  # the same for the group (patient), searched in the path; "none" for no groups
    classes: tuple[str, ...] = ()  # label order; () sorts the names
    modality: str = ""  # "ct" (body masks of axial slices are stored), "xray", or "" to infer it from DICOM and NIfTI
    # DICOM and NIfTI volumes:
    hu_windows: tuple[tuple[float, float], ...] = ((-600.0, 1500.0),)  # center and width in HU; three make RGB
    plane: str = "axial"  # or coronal, sagittal
    position: str = "all"  # every slice of a volume, or "mid": the middle one
    salt: str = ""  # of the hashes of patient ids
    limits: Limits = DEFAULT  # of a file; for every data set

    def folder_flags(self) -> list[str]:
        """Returns the flags for `folder` whose values differ from the defaults."""
        default = PrepareOptions()
        names = [f.name for f in fields(self) if f.name not in ("seed", "salt", "limits")]
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        return [f"--{'hu_window' if name == 'hu_windows' else name}" for name in changed]


@dataclass(frozen=True)
class DatasetName:
    """The parts of a data set's name."""

    base: str  # a key of DATASETS
    config: str
    stage: str = ""  # one of STAGES, "" for unmodified images
    size: tuple[int, int] | None = None  # height, width of the stored copy

    @property
    def full(self) -> str:
        """The name under which the data set is stored, such as "ct_cov19/lungs" or "covidx_ct/3a-crop-224"."""
        size = "" if self.size is None else "x".join(map(str, dict.fromkeys(self.size)))
        plain = self.config in PLAIN_CONFIGS and self.config == DATASETS[self.base].default
        config = "" if plain and self.stage else self.config
        parts = [part for part in (config, self.stage, size) if part]
        return f"{self.base}/{'-'.join(parts)}"


def resolve(name: str) -> tuple[DatasetName, Dataset]:
    """Returns the parts and the registry entry of a name such as "covidx_ct/3a-224". Raises ValueError if unknown."""
    base, _, rest = name.partition("/")
    if base not in DATASETS:
        raise ValueError(f"unknown data set {base!r}; {nearest(base, DATASETS)}")
    entry = DATASETS[base]
    parts, size, stage = rest.split("-") if rest else [], None, ""
    if len(parts) > 1 and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", parts[-1]):
        height, _, width = parts.pop().partition("x")
        size = (int(height), int(width or height))
        if max(size) > MAX_SIDE:
            raise ValueError(f"{name}: stored copies have at most {MAX_SIDE} pixels per side")
    if parts and parts[-1] in STAGES:
        stage = parts.pop()
    config = "-".join(parts) or entry.default
    if parts and not entry.configs and difflib.get_close_matches(parts[-1], STAGES, 1, 0.8):
        raise ValueError(f"{name}: {parts[-1]!r} looks like a stage ({', '.join(STAGES)}); a name ends in at most one")
    if entry.configs and config not in entry.configs:
        hint = f"a name is NAME/CONFIGURATION[-STAGE][-SIZE]; {nearest(config, (*entry.configs, *STAGES))}"
        raise ValueError(f"unknown configuration {config!r} of {base}; {hint}")
    if stage and not entry.axial:
        raise ValueError(f"{name}: stages are for axial CT slices, and {base} has none; remove {stage}")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", config):
        raise ValueError(f"data set {name!r}: the name after {base}/ may contain letters, digits, '_', '-' and '.'")
    return DatasetName(base, config, stage, size), entry


def about(base: str) -> About:
    """Returns the description of the data set `base`, a key of DATASETS."""
    description: About = _module(base).ABOUT
    return description


def describe(data: Prepared, data_dir: Path) -> dict[str, Any]:
    """Returns the `summary` of a prepared data set (None if missing) and its `about` (None for a user's folder)."""
    folder, base = prepared.directory(Path(data_dir), data.name), resolve(data.name)[0].base
    return {
        "summary": summary.read(folder) if (folder / summary.FILE).exists() else None,
        "about": None if base == "folder" else vars(about(base)),
    }


def classes(name: str) -> tuple[str, ...]:
    """Returns the classes of a data set in label order, () for `folder`. Raises ValueError for an unknown name."""
    parts, _ = resolve(name)
    names: Any = getattr(_module(parts.base), "CLASSES", ())
    return tuple(names[parts.config] if isinstance(names, Mapping) else names)


def help_text(name: str) -> str:
    """Returns the help page of a data set. Raises ValueError for an unknown name."""
    parts, entry = resolve(name)
    base, text = parts.base, about(parts.base)
    configs = ", ".join(f"{base}/{config}" for config in entry.configs) or f"{base}/ANY_NAME"
    stages = f"-STAGE-SIZE, with the stages {', '.join(STAGES)}" if entry.axial else "-SIZE"
    sections = {
        "Where to get it": text.origin,
        "Required folder": text.layout,
        "--set=data.protocol=clean (the default)": text.clean,
        "--set=data.protocol=study": text.study,
    }
    for config, splits in text.expected.items():
        rows = [f"  {split:<6}{' / '.join(f'{n:,}' for n in counts)}" for split, counts in splits.items()]
        sections[f"Published images per class, {base}/{config}"] = "\n".join(rows)
    sections |= {"License": text.licence, "Citation": text.citation}
    lines = [f"{base}: {text.title}", "", f"Names: {configs} (default: {base}/{entry.default})"]
    lines += [f"Versions: {base}/...{stages}", ""]
    for title, body in sections.items():
        lines += [f"{title}:", body, ""] if body else []
    source = "" if entry.synthetic else " --source=FOLDER"
    return "\n".join([*lines, f"python -m lungjax.prepare --dataset={parts.full}{source}"])


def open_dataset(name: str, data_dir: str | Path, protocol: str = "clean") -> Prepared:
    """Opens a prepared data set, or generates a synthetic one. Raises ValueError with the command to prepare it."""
    parts, entry = resolve(name)
    folder = prepared.directory(Path(data_dir), parts.full)
    if not prepared.is_prepared(folder) and entry.synthetic:
        write(parts.full, None, Path(data_dir), PrepareOptions(), keep=True, quiet=True)
    if prepared.is_prepared(folder):
        if (folder / summary.FILE).exists():
            summary.read(folder)  # raises ValueError for a damaged file now, not after the training
        return prepared.load(folder, parts.full, protocol)
    command = f"python -m lungjax.prepare --dataset={parts.full} --source=FOLDER --data_dir={data_dir}"
    raise ValueError(f"data set {parts.full} is not prepared in {data_dir}. Get {_origin(parts.base)}. Then: {command}")


def without_lungs(data: Prepared, data_dir: Path) -> Prepared | None:
    """Returns the test images of `data` with their lungs blacked out, as the test split of another data set.

    Images without a detected lung are omitted. Returns None if NAME-no_lungs is not prepared, if its classes or files
    differ, if no lung was detected, or if `data` is a stage, whose networks have not seen what surrounds the lungs.
    """
    parts = resolve(data.name)[0] if data.name.partition("/")[0] in DATASETS else None
    name = replace(parts, stage="no_lungs").full if parts and not parts.stage else ""
    if not name or not prepared.is_prepared(prepared.directory(data_dir, name)):
        return None
    dark = prepared.load(prepared.directory(data_dir, name), name)
    rows = np.isin(dark.columns["file"], data.columns["file"][data.rows("test")]) & dark.columns["found"]
    if dark.classes != data.classes or not rows.any():
        print(f"No control without lungs: {name} and {data.name} differ in classes or files, or no lung was detected")
        return None
    return replace(dark, columns=dark.columns | {"split": np.where(rows, "test", "")}, rotate=data.rotate)


def write(name: str, source: Path | None, data_dir: Path, options: PrepareOptions, **settings: Any) -> dict[str, Any]:
    """Prepares the data set `name` from the folder `source` (None for a synthetic one).

    `settings` are those of `writer.prepare`: window, on_bad_image, overwrite, keep, quiet. Returns the summary.
    Raises ValueError for problems with the name, the options, the folder or an image.
    """
    parts, entry = resolve(name)
    flags = options.folder_flags() if parts.base != "folder" else []
    if entry.synthetic and source is not None:
        flags.append("--source")
    if flags:
        raise ValueError(f"{flags[0]} applies only to image folders, not to {parts.base}; remove it")
    if not entry.synthetic and (source is None or not source.is_dir()):
        problem = f"--source={source} is not a folder" if source else "--source=FOLDER is missing"
        raise ValueError(f"{problem}: {parts.full} requires {_origin(parts.base)}")
    from lungjax.datasets.build import writer  # here: it imports TFDS

    if parts.base == "folder" and not options.salt:
        options = replace(options, salt=_salt(data_dir))
    listing = _module(parts.base).listing(source, parts.config, options)
    listing = replace(listing, modality=entry.modality or listing.modality)
    settings |= {"stage": parts.stage, "size": parts.size, "limits": options.limits}
    return writer.prepare(parts.full, listing, data_dir, **settings)


def lookup(name: str, source: Path | None, data_dir: Path, options: PrepareOptions) -> list[str]:
    """Returns the files of a user's folder that a name in a report stands for; raises ValueError if there are none."""
    if source is None or not source.is_dir():
        raise ValueError(f"--lookup={name}: --source={source} is not the folder that was prepared")
    if not (data_dir / SALT_FILE).exists():
        raise ValueError(f"--lookup={name}: {data_dir} has no {SALT_FILE}; give the --data_dir used with prepare")
    return list(_module("folder").lookup(source, name, replace(options, salt=_salt(data_dir))))


def _module(base: str) -> Any:
    return importlib.import_module(f"lungjax.datasets.{base}")


def _origin(base: str) -> str:
    return f"{about(base).origin.rstrip('.')}; details: python -m lungjax.prepare --dataset={base} --help"


def _salt(data_dir: Path) -> str:
    """Returns the salt of the patient hashes in `data_dir`, which is drawn on first use."""
    file = data_dir / SALT_FILE
    if not file.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=data_dir) as draft:  # only its owner may read it
            draft.write(secrets.token_hex(16))
            draft.flush()
            with contextlib.suppress(FileExistsError):  # another process has created the file; its salt is used
                os.link(draft.name, file)
    salt = file.read_text().strip()
    if not salt:
        raise ValueError(f"{file} is empty, and without a salt patient ids can be guessed; delete the file")
    return salt
