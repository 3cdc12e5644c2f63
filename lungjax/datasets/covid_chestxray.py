"""The COVID-19 image data collection: frontal chest X-rays from papers and web pages, with findings and patients."""

from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

from lungjax.config import nearest
from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

CLASSES = {
    "covid": ("non-COVID-19", "COVID-19"),
    "findings": ("No Finding", "COVID-19", "Other viral", "Bacterial", "Fungal"),
}
FRONTAL = ("PA", "AP", "AP Supine", "AP Erect")
COLUMNS = ("patientid", "finding", "view", "modality", "folder", "filename", "url")
EXTRA = ("sex", "age", "RT_PCR_positive", "license")  # extra columns of the index
ROOT_FINDINGS = ("No Finding", "Pneumonia", "Tuberculosis", "Unknown", "todo")  # first parts of a finding such as A/B/C

ABOUT = files.about("covid_chestxray")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the frontal X-rays in `source`. Raises ValueError for a missing table or column, or an invalid row."""
    table = files.find(source, ("metadata.csv", "covid-chestxray-dataset/metadata.csv"), "metadata.csv")
    listed, skipped = [], Counter[str]()
    for where, row in read_table(table, COLUMNS + EXTRA).rows:
        label = label_of(row["finding"], config, where)
        if row["modality"] != "X-ray" or row["view"] not in FRONTAL:
            skipped[f"{row['modality'] or 'no modality'} {row['view'] or 'no view'}"] += 1
        elif label is None:
            skipped[row["finding"]] += 1
        else:
            for name in ("patientid", "filename"):
                if not row[name]:
                    raise ValueError(f"{where}: {name} is empty")
            file, group = f"{row['folder'] or 'images'}/{row['filename']}", f"patient {row['patientid']}"
            site = urlparse(row["url"]).netloc.removeprefix("www.")
            extra = (row["view"], row["finding"], *(row[name] for name in EXTRA))
            image = str(table.parent / file)
            listed.append(Example(file, image, label, "", group, site, extra=extra, where=where))
    if not listed:
        raise ValueError(f"{table}: no frontal X-ray with a known finding")
    examples, notes = complete_splits(listed, options.seed)
    notes += compare_counts(examples, CLASSES[config], ABOUT.expected[config], "the collection")
    if skipped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common())
        notes.append(f"{skipped.total()} rows omitted: {reasons}")
    return Listing(CLASSES[config], examples, ("view", "finding", *EXTRA), tuple(notes))


def label_of(finding: str, config: str, where: str) -> int | None:
    """Returns the label of a finding such as "Pneumonia/Viral/COVID-19", or None. Raises ValueError if unknown."""
    parts = finding.split("/")
    if parts[0] not in ROOT_FINDINGS:
        raise ValueError(f"{where}: unknown finding {finding!r}; {nearest(parts[0], ROOT_FINDINGS)}")
    if parts[0] in ("Unknown", "todo"):
        return None
    covid = parts[1:3] == ["Viral", "COVID-19"]
    if config == "covid":
        return int(covid)
    if parts[0] == "No Finding":
        return 0
    if parts[0] != "Pneumonia" or len(parts) == 1:
        return None
    return 1 if covid else {"Viral": 2, "Bacterial": 3, "Fungal": 4}.get(parts[1])
