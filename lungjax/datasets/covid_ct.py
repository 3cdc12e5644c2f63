"""COVID-CT (UCSD): CT slices cut out of papers on COVID-19, and others from MedPix, LUNA, Radiopaedia and papers.

Source: https://github.com/UCSD-AI4H/COVID-CT (Images-processed, Data-split, NonCOVID-CT-MetaInfo.csv).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lungjax.data import splits
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, differences

CLASSES = ("NonCOVID", "COVID")  # label numbers 0, 1 of the authors' code
TABLE = "NonCOVID-CT-MetaInfo.csv"
GAP = 3  # file numbers of MedPix slices of one patient are this near to each other

ABOUT = About(
    title="axial chest CT slices from papers and teaching files: COVID-19 or not",
    origin="https://github.com/UCSD-AI4H/COVID-CT (746 slices, about 90 MB; git clone or its zip)",
    layout=(
        "Images-processed/{CT_COVID,CT_NonCOVID}/FILE (unpack the two zip files there), "
        "Data-split/COVID/{train,val,test}CT_COVID.txt, Data-split/NonCOVID/{train,val,test}CT_NonCOVID.txt, and "
        f"{TABLE} with the patients (without it they are told by the file numbers)."
    ),
    licence="None is stated for the images, which are figures of papers and web pages, each with its own terms.",
    citation="Yang et al.: COVID-CT-Dataset: a CT image dataset about COVID-19, arXiv 2003.13865, 2020.",
    study="The authors' split lists, by patient.",
    clean=(
        "The authors' split lists. A COVID slice's group is its paper, which is coarser than the patient, for figures "
        "may come from one scan; a paper in two lists, and twins, stay on the test's side."
    ),
    expected={"default": {"train": (234, 191), "val": (58, 60), "test": (105, 98)}},
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices that the split lists of the repository `source` name.

    Raises ValueError for a missing list or image folder, with the names looked for, or a file named twice.
    """
    files.refuse_flags(options, "covid_ct")
    rows: list[tuple[str, str, int, str]] = []  # place, split, label, file
    for label, name in enumerate(CLASSES):
        for split in splits.SPLITS:
            path = files.find(
                source, (f"Data-split/{name}/{split}CT_{name}.txt", f"{split}CT_{name}.txt"), f"{split} list of {name}"
            )
            rows += [(where, split, label, file) for where, file in files.lines(path)]
    places = [_images(source, name) for name in CLASSES]
    known = _patients(source)
    names = [file for _, _, label, file in rows if label == 0]
    runs = _runs(names)
    examples = [
        Example(
            file=f"CT_{CLASSES[label]}/{file}",
            image=str(places[label] / file),
            label=label,
            split=split,
            group=f"paper {paper(file)}" if label else known.get(file) or crawled(file) or runs.get(file, file),
            source=origin(file, label),
            where=where,
            study=split,
        )
        for where, split, label, file in rows
    ]
    files.check_unique(examples)
    notes = differences(examples, CLASSES, (ABOUT.expected or {})["default"], "COVID-CT")
    lacking = [file for file in names if file not in known]
    if lacking:
        why = f"{TABLE} lacks {len(lacking)} of them" if known else f"there is no {TABLE}"
        notes.append(f"patients of NonCOVID slices are told by file numbers: {why}")
    listed = {example.file for example in examples}
    for name, place in zip(CLASSES, places, strict=True):
        spare = sum(f"CT_{name}/{path}" not in listed for path in files.pictures(place))
        if spare:
            notes.append(f"images of {place.name} that no split list names were left out: {spare}")
    return Listing(CLASSES, examples, notes=tuple(notes), group_name="patients or papers", study=ABOUT.study, body=True)


def paper(file: str) -> str:
    """Returns the paper of a COVID file: of "2020.01.24.919183-p27-132.png" what precedes the page.

    Names of Elsevier's papers hold no page: "PIIS0140673620301549_0%1.png" is PIIS0140673620301549.
    """
    return re.sub(r"(?<=^PIIS\d{16}).*|-p\d+-[^-]*(?:-\d+)?$", "", files.stem_of(file))


def crawled(file: str) -> str:
    """Returns the patient of a slice from the web, numbered before "%" ("63%3.jpg", "64.jpg"); "" for other names."""
    match = re.fullmatch(r"(\d+)(?:%\d+)?\.jpe?g|(\d+)%\d+\.png", file, re.IGNORECASE)
    return f"crawled_patient_{match.group(1) or match.group(2)}" if match else ""


def origin(file: str, label: int) -> str:
    """Returns where a slice comes from, as far as its name tells."""
    if label:
        return "preprint" if re.match(r"\d{4}\.\d\d\.\d\d\.", file) else "paper"
    return "web" if crawled(file) else "MedPix"


def _images(source: Path, name: str) -> Path:
    folder = f"CT_{name}"
    return files.find(
        source,
        (f"Images-processed/{folder}/", f"Images-processed/{folder}/{folder}/", f"{folder}/"),
        f"image folder of {name}",
        f"if {folder}.zip is there, unpack it in its place",
    )


def _patients(source: Path) -> dict[str, str]:
    """Returns the patient of each NonCOVID file by the repository's table; nothing if the table is not there."""
    if not (source / TABLE).is_file():
        return {}
    return {
        row["image name"]: row["patient id"] for _, row in files.table(source / TABLE, ("image name", "patient id"))
    }


def _runs(names: Sequence[str]) -> dict[str, str]:
    """Returns the run of numbers that each numbered PNG file belongs to; MedPix's slices are numbered by patient."""
    numbers = sorted(
        (int(files.stem_of(file)), file) for file in names if re.fullmatch(r"\d+\.png", file, re.IGNORECASE)
    )
    runs, start, last = {}, 0, -GAP - 1
    for number, file in numbers:
        if number - last > GAP:
            start = number
        runs[file] = f"medpix_run_{start}"
        last = number
    return runs
