"""COVID-XRay-5K (DeepCovid): chest X-rays, COVID-19 or not; the official archive or the study's repository.

Sources: https://github.com/shervinmin/DeepCovid (Minaee et al., arXiv 2004.09363); the study's own copy of it:
https://github.com/Mithunjack/covid-19-xay-image-classification.
"""

import re
from collections import Counter
from pathlib import Path

from lungjax.data import splits
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, differences

CLASSES = ("covid", "non")  # label numbers 0, 1: the folders in order, so the study's sigmoid was P(non)
ROOTS = ("", "data_upload_v3/", "data_upload_v3/data_upload_v3/", "data/")
REPOSITORY = {"train": (242, 994), "test": (100, 1473)}  # what the study's repository holds

# Names that generators give: Keras's PREFIX_INDEX_HASH with the study's prefix, Augmentor's FOLDER_original_FILE_UUID.
GENERATED = re.compile(r"a_\d+_\d+$|.*_original_.+_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
CHEXPERT = re.compile(r"(?:(.+?)[-_ ]?)?(patient\d+)[-_]", re.IGNORECASE)

ABOUT = About(
    title="chest X-rays: COVID-19 (COVID-19 image data collection) or not (CheXpert)",
    origin=(
        "data_upload_v3.zip, linked in https://github.com/shervinmin/DeepCovid (5,184 X-rays, or 5,520 with the "
        "generated ones), or the folders train and test of "
        "https://github.com/Mithunjack/covid-19-xay-image-classification (2,809 X-rays)"
    ),
    layout=(
        "{train,test}/{covid,non}/FILE, or with more folders below these; also inside data_upload_v3. In train/covid "
        'the generated files are told by their names ("a_NUMBER_NUMBER.jpg" of Keras, "..._original_..._UUID" of '
        "Augmentor)."
    ),
    licence=(
        "None for the whole. CheXpert: Stanford's research use agreement (no sharing, no commercial use). The "
        "COVID-19 images: each its own, see covid_chestxray."
    ),
    citation=(
        "Minaee et al.: Deep-COVID: Predicting COVID-19 from chest X-ray images using deep transfer learning, Medical "
        "Image Analysis 65, 2020; Irvin et al.: CheXpert, AAAI 2019; Cohen et al.: COVID-19 image data collection, "
        "2020."
    ),
    study=(
        "Train with the generated images; the test images are the validation set too. In the study's repository 37 of "
        "the 100 COVID-19 test images are also training images, and all generated ones come from one X-ray."
    ),
    clean=(
        "Test as shipped; val is cut from train by patient (CheXpert's patient; for COVID-19 the case or paper in the "
        "file name, else the image itself). Generated images, and training images with a twin in test, are left out."
    ),
    expected={"default": {"train": (420, 2000), "test": (100, 3000)}},
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the X-rays of the archive or repository `source`.

    Raises ValueError for a missing split or class folder, with the names looked for, or one without images.
    """
    files.refuse_flags(options, "covid_xray_5k")
    found: list[tuple[str, int, Path, str]] = []  # split, label, class folder, path in it
    for split in ("train", "test"):
        folder = files.find(source, [f"{root}{split}/" for root in ROOTS], f"{split} folder")
        for label, name in enumerate(CLASSES):
            inner = files.find(folder, (f"{name}/",), f"folder of class {name}")
            paths = files.pictures(inner)
            if not paths:
                raise ValueError(f"{inner} has no image")
            found += [(split, label, inner, path) for path in paths]
    generated = [split == "train" and label == 0 and is_generated(path) for split, label, _, path in found]
    groups = [
        "generated" if made else group(path, label) for (_, label, _, path), made in zip(found, generated, strict=True)
    ]
    real = [i for i, made in enumerate(generated) if not made]
    named, notes = splits.complete(
        [found[i][0] for i in real], [found[i][1] for i in real], [groups[i] for i in real], options.seed
    )
    start = dict(zip(real, named, strict=True))
    examples = [
        Example(
            file=(inner / path).relative_to(source).as_posix(),
            image=str(inner / path),
            label=label,
            split=start.get(i, ""),
            group=groups[i],
            source="COVID-19 image data collection" if label == 0 else "CheXpert",
            extra=(finding(path) if label else "COVID-19",),
            study="train" if split == "train" else "val+test",
        )
        for i, (split, label, inner, path) in enumerate(found)
    ]
    counts = Counter((split, label) for split, label, _, _ in found)
    if all(counts[split, label] == n for split, both in REPOSITORY.items() for label, n in enumerate(both)):
        notes.append("all images per class are as in the study's repository")
    else:
        notes += differences(examples, CLASSES, (ABOUT.expected or {})["default"], "COVID-XRay-5K")
    if any(generated):
        notes.append(
            f"{sum(generated)} generated images in train/covid, told by their names: only protocol=study has them"
        )
    return Listing(CLASSES, examples, ("finding",), tuple(notes), "patients, papers or images", ABOUT.study)


def is_generated(path: str) -> bool:
    """Returns whether a file of train/covid bears a name that a generator of images gave it."""
    return GENERATED.match(files.stem_of(path)) is not None


def group(path: str, label: int) -> str:
    """Returns CheXpert's patient of a non-COVID file, else the case or paper that the file's name tells."""
    stem = files.stem_of(path)
    match = CHEXPERT.match(stem)
    if label == 1:
        return match.group(2).lower() if match else stem
    return files.web_case(stem)


def finding(path: str) -> str:
    """Returns the finding of a CheXpert file: the folder below its class, else what precedes the patient's number."""
    folder, _, _ = path.rpartition("/")
    match = CHEXPERT.match(files.stem_of(path))
    return folder or (match.group(1) or "" if match else "")
