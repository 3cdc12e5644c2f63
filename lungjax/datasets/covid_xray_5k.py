"""COVID-XRay-5K (DeepCovid): chest X-rays, COVID-19 or not; the official archive or the study's repository."""

import re
from collections import Counter
from pathlib import Path

from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, compare_counts, complete_splits

CLASSES = ("covid", "non")  # labels 0, 1: the folders in order, so the study's sigmoid was P(non)
ROOTS = ("", "data_upload_v3/", "data_upload_v3/data_upload_v3/", "data/")
REPOSITORY = {"train": (242, 994), "test": (100, 1473)}  # images per class in the study's repository

# Names of generated files: Keras's PREFIX_INDEX_HASH with the study's prefix, Augmentor's FOLDER_original_FILE_UUID.
GENERATED = re.compile(r"a_\d+_\d+$|.*_original_.+_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
CHEXPERT = re.compile(r"(?:(.+?)[-_ ]?)?(patient\d+)[-_]", re.IGNORECASE)

ABOUT = About(
    title="chest X-rays: COVID-19 (COVID-19 image data collection) or not (CheXpert)",
    origin="data_upload_v3.zip, linked in https://github.com/shervinmin/DeepCovid (5,184 X-rays, or 5,520 with the "
    "generated ones), or https://github.com/Mithunjack/covid-19-xay-image-classification (2,809 X-rays)",
    layout="{train,test}/{covid,non}/FILE, with any subfolders, also inside data_upload_v3. Generated files in "
    'train/covid are recognized by name ("a_NUMBER_NUMBER.jpg" of Keras, "..._original_..._UUID" of Augmentor).',
    licence="None for the complete set. CheXpert: Stanford's research use agreement (no sharing, no commercial use). "
    "COVID-19 images: individual licenses, see covid_chestxray.",
    citation="Minaee et al.: Deep-COVID, Medical Image Analysis 65, 2020; Irvin et al.: CheXpert, AAAI 2019; Cohen et "
    "al.: COVID-19 image data collection, 2020.",
    study="Train with the generated images; test is also the validation set. In the study's repository 37 of the 100 "
    "COVID-19 test images are also in train, and all generated images come from one X-ray.",
    clean="The original test split; val is cut from train by patient (COVID-19: the case or paper in the file name). "
    "Generated images and train images with a near duplicate in test are removed.",
    expected={"default": {"train": (420, 2000), "test": (100, 3000)}},
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the X-rays of the archive or repository `source`.

    Raises ValueError for a missing split or class folder, with the names tried, or one without images.
    """
    images: list[tuple[str, int, Path, str]] = []  # split, label, path, path below the class folder
    for split in ("train", "test"):
        folder = files.find(source, [f"{root}{split}/" for root in ROOTS], f"{split} folder")
        for label, name in enumerate(CLASSES):
            images += [(split, label, path, inner) for path, inner in files.class_images(folder, name)]
    listed = []
    for split, label, path, inner in images:
        generated = split == "train" and not label and GENERATED.match(path.stem)
        example = Example(
            file=path.relative_to(source).as_posix(),
            image=str(path),
            label=label,
            split="" if generated else split,
            group="generated" if generated else group(inner, label),
            source="CheXpert" if label else "COVID-19 image data collection",
            extra=(finding(inner) if label else "COVID-19",),
            study="train" if split == "train" else "val+test",
        )
        listed.append(example)
    real, notes = complete_splits([example for example in listed if example.split], options.seed)
    clean = {example.file: example for example in real}
    examples = [clean.get(example.file, example) for example in listed]
    counts = Counter((split, label) for split, label, _, _ in images)
    if all(counts[split, label] == n for split, both in REPOSITORY.items() for label, n in enumerate(both)):
        notes.append("all images per class are as in the study's repository")
    else:
        notes += compare_counts(examples, CLASSES, ABOUT.expected["default"], "COVID-XRay-5K")
    if len(real) < len(images):
        count = len(images) - len(real)
        notes.append(f"{count} generated images in train/covid, recognized by name, are used only by protocol=study")
    return Listing(CLASSES, examples, ("finding",), tuple(notes), "patients, papers or images", ABOUT.study)


def group(file: str, label: int) -> str:
    """Returns CheXpert's patient of a non-COVID file, else the case or paper in the file name."""
    stem = Path(file).stem
    match = CHEXPERT.match(stem)
    if label == 1:
        return match.group(2).lower() if match else stem
    return files.web_case(stem)


def finding(path: str) -> str:
    """Returns the finding of a CheXpert file: its folder below the class, else the text before the patient number."""
    match = CHEXPERT.match(Path(path).stem)
    return path.rpartition("/")[0] or (match.group(1) or "" if match else "")
