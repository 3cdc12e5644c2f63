"""COVID-CT (UCSD): CT slices from papers on COVID-19, and others from MedPix, LUNA, Radiopaedia and papers."""

import re
from pathlib import Path

from lungjax.data import splits
from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts

CLASSES = ("NonCOVID", "COVID")  # labels 0, 1 of the authors' code
TABLE = "NonCOVID-CT-MetaInfo.csv"
MAX_GAP = 3  # between the file numbers of consecutive MedPix slices of one patient

ABOUT = files.about("covid_ct")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices in the split lists of `source`. Raises ValueError for missing or repeated files."""
    rows: list[tuple[str, str, int, str]] = []  # place, split, label, file
    for label, name in enumerate(CLASSES):
        for split in splits.SPLITS:
            names = (f"Data-split/{name}/{split}CT_{name}.txt", f"{split}CT_{name}.txt")
            lines = files.read_lines(files.find(source, names, f"{split} list of {name}"))
            rows += [(where, split, label, file) for where, file in lines]
    hint = "unpack the zip files of Images-processed"
    folders = []
    for name in CLASSES:
        roots = ("Images-processed/", f"Images-processed/CT_{name}/", "")
        folders.append(files.find(source, [f"{root}CT_{name}/" for root in roots], f"image folder of {name}", hint))
    table = source / TABLE
    named = read_table(table, ("image name", "patient id")).rows if table.is_file() else []
    patients = {row["image name"]: row["patient id"] for _, row in named}
    negatives = [file for _, _, label, file in rows if label == 0]
    # MedPix numbers slices by patient.
    numbers = {
        file: ("medpix_run_", int(Path(file).stem)) for file in negatives if re.fullmatch(r"\d+\.png", file, re.I)
    }
    runs = files.runs(numbers, MAX_GAP)
    examples = []
    for where, split, label, file in rows:
        name, image, place = f"CT_{CLASSES[label]}/{file}", str(folders[label] / file), origin(file, label)
        group = f"paper {paper(file)}" if label else patients.get(file) or web_patient(file) or runs.get(file, file)
        examples.append(Example(name, image, label, split, group, place, where=where, study=split))
    notes = compare_counts(examples, CLASSES, ABOUT.expected["default"], "COVID-CT")
    missing = len([file for file in negatives if file not in patients])
    if missing:
        reason = f"{TABLE} lacks {missing} of them" if patients else f"{TABLE} is missing"
        notes.append(f"patients of NonCOVID slices are inferred from file numbers: {reason}")
    listed = {example.file for example in examples}
    for name, folder in zip(CLASSES, folders, strict=True):
        unlisted = sum(f"CT_{name}/{path}" not in listed for path in files.list_images(folder))
        if unlisted:
            notes.append(f"images of {folder.name} in no split list, omitted: {unlisted}")
    return Listing(CLASSES, examples, notes=tuple(notes), group_name="patients or papers", study=ABOUT.study, body=True)


def paper(file: str) -> str:
    """Returns the paper of a COVID file: the part before the page in a name such as "2020.01.24.919183-p27-132.png".

    Elsevier's names contain no page: the paper of "PIIS0140673620301549_0%1.png" is PIIS0140673620301549.
    """
    return re.sub(r"(?<=^PIIS\d{16}).*|-p\d+-[^-]*(?:-\d+)?$", "", Path(file).stem)


def web_patient(file: str) -> str:
    """Returns the patient of a slice from the web, numbered before "%" ("63%3.jpg", "64.jpg"); "" for other names."""
    match = re.fullmatch(r"(\d+)(?:%\d+)?\.jpe?g|(\d+)%\d+\.png", file, re.IGNORECASE)
    return f"crawled_patient_{match.group(1) or match.group(2)}" if match else ""


def origin(file: str, label: int) -> str:
    """Returns the source of a slice, inferred from its name."""
    if label:
        return "preprint" if re.match(r"\d{4}\.\d\d\.\d\d\.", file) else "paper"
    return "web" if web_patient(file) else "MedPix"
