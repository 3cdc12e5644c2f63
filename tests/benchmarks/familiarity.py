"""What `lungjax.evaluation.novelty` and simpler scores warn of, on real slices and X-rays and on drawn slices.

    python -m tests.benchmarks.familiarity --shared=FOLDER [--sets=ct,xray,phantom] [--network] [--parts=all]

FOLDER/data has `ct`, `xray` and `covidx_ct_volume`, the first two with a `labels.csv` of columns path, split and group
(no group in two splits). Each score is fitted on up to 2,000 training images, its threshold chosen on the validation
images by the same rule, and the share of test images and of strangers above the threshold printed. Strangers are made
of the test images unless they are photographs or of another set.

--parts is some of: strangers, sources (leave one source out), few (small training sets), cost; or all. --network adds
the Mahalanobis distance of EfficientNet-Lite0's pooled ImageNet features to `strangers` (minutes).
"""

import argparse
import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image, ImageDraw

from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions, phantom_ct
from lungjax.evaluation import novelty

Picture = np.ndarray
MOST, EACH = 2000, 150  # training images; strangers of a kind
COLOUR = "astronaut coffee chelsea color rocket retina ihc hubble_deep_field motorcycle_left motorcycle_right"
GRAY = "camera coins moon page text brick gravel grass cell phantom clock_motion"
OTHER = {"ct": "xray", "xray": "ct", "phantom": "xray"}
SPLITS = ("train", "val", "test")


def load(name: str, shared: Path) -> dict[str, list[tuple[Picture, str]]]:
    """Returns pictures and their sources by split."""
    found: dict[str, list[tuple[Picture, str]]] = {split: [] for split in SPLITS}
    if name == "phantom":
        for example in phantom_ct.listing(None, "default", PrepareOptions()).examples:
            found[example.split].append((images.decode(example.image(), None), example.source))
        return found
    with (shared / "data" / name / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            picture = images.decode((shared / "data" / name / row["path"]).read_bytes(), None)
            found[row["split"]].append((picture, row.get("source") or Path(row["path"]).name.split("_")[0]))
    return found


def photographs(names: str) -> list[Picture]:
    folder = Path(skimage.__file__).parent / "data"
    files = [next(folder.glob(f"{name}.*g")) for name in names.split()]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def resized(picture: Picture, width: int, height: int) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((max(width, 1), max(height, 1)), Image.Resampling.BILINEAR))


def colours(picture: Picture) -> Picture:
    return np.repeat(picture[..., None], 3, axis=2)


def window(picture: Picture, low: float, high: float) -> Picture:
    return np.clip((picture.astype(float) - low) * 255 / (high - low), 0, 255).astype(np.uint8)


def shot(picture: Picture) -> Picture:
    """A viewer's window with the picture in it."""
    page = Image.new("RGB", (1280, 800), (240, 240, 240))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 1280, 60), fill=(40, 60, 120))
    draw.rectangle((0, 60, 250, 800), fill=(210, 210, 215))
    for line in range(25):
        draw.text((15, 80 + 26 * line), f"Series {line}  axial 5.0", fill=(20, 20, 20))
    page.paste(Image.fromarray(colours(picture)).resize((560, 560)), (420, 160))
    return np.asarray(page)


def text(dark: bool) -> Picture:
    page = Image.new("L", (1280, 800), 30 if dark else 245)
    draw = ImageDraw.Draw(page)
    for line in range(30):
        draw.text(
            (20, 10 + 25 * line), f"Line {line}: no focal opacity, heart size normal. " * 4, fill=230 if dark else 20
        )
    return np.asarray(page)


def paper(picture: Picture) -> Picture:
    height, width = picture.shape
    page = np.full((int(height * 1.5), int(width * 1.5)), 245, np.uint8)
    page[height // 4 : height // 4 + height, width // 4 : width // 4 + width] = picture
    return page


def crop(picture: Picture) -> Picture:
    height, width = picture.shape
    return picture[height // 3 : height // 3 + height // 4, width // 6 : width // 6 + width // 4]


def overlay(picture: Picture) -> Picture:
    """A heat map laid over the picture."""
    height, width = picture.shape
    row, column = np.mgrid[:height, :width]
    heat = np.exp(-(((row - height * 0.45) / (height * 0.2)) ** 2 + ((column - width * 0.3) / (width * 0.2)) ** 2))
    jet = np.stack([np.clip(1.5 - abs(4 * heat - k), 0, 1) for k in (3, 2, 1)], -1) * 255
    return (0.5 * colours(picture) + 0.5 * jet).astype(np.uint8)


def jpeg(picture: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(colours(picture)).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer))


def strangers(
    test: Sequence[Picture], other: Sequence[Picture], volume: Picture
) -> Iterator[tuple[str, list[Picture]]]:
    """Yields kinds of strangers and their pictures; kinds that begin with "=" should be as familiar as the test images.

    Args:
        test: gray pictures of the set.
        other: of another kind of image.
        volume: [slices, H, W], slices of a patient from the shoulders down.
    """
    rng = np.random.default_rng(0)
    some = [test[i] for i in rng.permutation(len(test))[:EACH]]
    photos = photographs(COLOUR)

    def noisy(p: Picture, by: float) -> Picture:
        return np.clip(p + rng.normal(0, by, p.shape), 0, 255).astype(np.uint8)

    yield "the other modality", [other[i] for i in rng.permutation(len(other))[:EACH]]
    yield "colour photographs", photos
    yield "gray photographs", [images.gray(p) for p in (*photographs(GRAY), *photos)]
    yield "blank, 0 to 255", [np.full((256, 256), v, np.uint8) for v in (0, 1, 64, 128, 200, 255)]
    plain = [rng.integers(0, 256, (256, 256, *c), dtype=np.uint8) for c in [()] * 5 + [(3,)] * 5]
    yield "noise alone", plain + [noisy(np.full((512, 512), 128), 20) for _ in range(5)]
    yield "page of text", [text(False), text(True)]
    yield "screenshot of a viewer", [shot(p) for p in some[:60]]
    yield "the same in gray", [images.gray(shot(p)) for p in some[:60]]
    yield (
        "four in one picture",
        [
            np.block([[resized(p, 256, 256) for p in four[:2]], [resized(p, 256, 256) for p in four[2:]]])
            for four in zip(some[::4], some[1::4], some[2::4], some[3::4], strict=False)
        ],
    )
    changes: dict[str, Callable[[Picture], Picture]] = {
        "colour heat map over it": overlay,
        "tinted, as old film": lambda p: np.clip(colours(p) * np.asarray([1.0, 0.88, 0.7]), 0, 255).astype(np.uint8),
        "inverted": lambda p: 255 - p,
        "turned by 90 degrees": np.rot90,
        "upside down": lambda p: p[::-1],
        "mirrored": lambda p: p[:, ::-1],
        "soft-tissue window": lambda p: window(p, 110, 190),
        "over-exposed": lambda p: window(p, 0, 90),
        "under-exposed": lambda p: window(p, 0, 730),
        "a twelfth of the width, enlarged": lambda p: resized(resized(p, 12, 12), p.shape[1], p.shape[0]),
        "noise of 60 gray levels added": lambda p: noisy(p, 60),
        "upper half black": lambda p: np.where(np.arange(len(p))[:, None] < len(p) // 2, 0, p).astype(np.uint8),
        "a sixteenth of the area": crop,
        "white margin, as on paper": paper,
        "stretched to twice the width": lambda p: resized(p, 2 * p.shape[1], p.shape[0]),
        "= half the size": lambda p: resized(p, p.shape[1] // 2, p.shape[0] // 2),
        "= twice the size": lambda p: resized(p, 2 * p.shape[1], 2 * p.shape[0]),
        "= saved as colour JPEG, quality 50": jpeg,
        "= colour noise of 4 gray levels": lambda p: noisy(colours(p), 4),
        "= 10 gray levels brighter": lambda p: window(p, -10, 245),
    }
    for name, change in changes.items():
        yield name, [change(p) for p in some]
    yield "volume: axial, lungs", list(volume[6:42])
    yield "volume: axial, shoulders", list(volume[:3])
    yield "volume: axial, abdomen", list(volume[-3:])
    yield "volume: coronal", [resized(volume[:, k], 512, 350) for k in range(160, 340, 10)]
    yield "volume: sagittal", [resized(volume[:, :, k], 512, 350) for k in range(160, 340, 10)]


Score = Callable[[Sequence[Picture]], np.ndarray]


def ours(train: Sequence[Picture], val: Sequence[Picture]) -> Score:
    fitted = novelty.fit(train, val, [])
    return lambda pictures: np.asarray([fitted.unlike(p) for p in pictures])


def gauss(describe: Callable[[Sequence[Picture]], np.ndarray]) -> Callable[..., Score]:
    """The textbook's Mahalanobis distance: standardised, covariance shrunk by a twentieth."""

    def fit(train: Sequence[Picture], val: Sequence[Picture]) -> Score:
        known = describe(train)
        mean, deviation = known.mean(0), np.maximum(known.std(0), 0.5)
        z = (known - mean) / deviation
        covariance = 0.95 * np.cov(z.T) + 0.05 * np.eye(z.shape[1])
        root = np.linalg.inv(np.linalg.cholesky(covariance))
        return calibrated(lambda p: np.linalg.norm(root @ ((describe(p) - mean) / deviation).T, axis=0), val)

    return fit


def residual(train: Sequence[Picture], val: Sequence[Picture]) -> Score:
    """What 40 principal components of 16 x 16 thumbnails leave over."""
    known = thumbnails(train)
    mean = known.mean(0)
    axes = np.linalg.eigh(np.cov(known.T))[1][:, -40:]

    def score(pictures: Sequence[Picture]) -> np.ndarray:
        away = thumbnails(pictures) - mean
        return np.linalg.norm(away - away @ axes @ axes.T, axis=1)

    return calibrated(score, val)


def calibrated(score: Score, val: Sequence[Picture]) -> Score:
    threshold = novelty._threshold(score(val))
    return lambda pictures: score(pictures) / threshold


def thumbnails(pictures: Sequence[Picture]) -> np.ndarray:
    gray = (Image.fromarray(images.gray(p)) for p in pictures)
    return np.asarray([np.asarray(p.resize((16, 16), Image.Resampling.BOX), float).ravel() for p in gray])


def statistics(pictures: Sequence[Picture]) -> np.ndarray:
    found = [novelty.measure(p) for p in pictures]
    return np.asarray([np.concatenate([f["light"], f["form"]]) for f in found])


def everything(pictures: Sequence[Picture]) -> np.ndarray:
    found = [novelty.measure(p) for p in pictures]
    return np.asarray([np.concatenate(list(f.values())) for f in found])


def network() -> Callable[[Sequence[Picture]], np.ndarray]:
    """Pooled features [N, 1280] of EfficientNet-Lite0 with ImageNet weights."""
    import jax

    import lungjax

    net, variables, spec = lungjax.create("efficientnet_lite0", weights="imagenet")
    run = jax.jit(lambda x: net.apply(variables, x, train=False)[1]["last"].mean((1, 2)))

    def features(pictures: Sequence[Picture]) -> np.ndarray:
        out = []
        for start in range(0, len(pictures), 16):
            batch = [colours(p) if p.ndim == 2 else p for p in pictures[start : start + 16]]
            pixels = np.concatenate([lungjax.preprocess(p, spec).reshape(1, *spec.size, 3) for p in batch])
            padded = np.concatenate([pixels, np.zeros((16 - len(pixels), *pixels.shape[1:]), pixels.dtype)])
            out.append(10 * np.asarray(run(padded))[: len(batch)])
        return np.concatenate(out)

    return features


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print("| " + " | ".join(header) + " |\n| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def share(scores: np.ndarray) -> str:
    return f"{100 * (scores > 1).mean():.1f}" if len(scores) > 200 else f"{100 * (scores > 1).mean():.0f}"


def compare(
    name: str, data: dict[str, list[Any]], other: list[Picture], volume: Picture, scores: dict[str, Any]
) -> None:
    """Prints per cent above the threshold and, of ours, the median score."""
    train, val, test = ([p for p, _ in data[split]] for split in SPLITS)
    fitted = {kind: fit(train, val) for kind, fit in scores.items()}
    rows = [[f"**{name}: test images, {len(test)}**", *(share(score(test)) for score in fitted.values()), ""]]
    found: list[list[float]] = []
    for kind, pictures in strangers([images.gray(p) for p in test], other, volume):
        values = [score(pictures) for score in fitted.values()]
        rows.append([f"{kind}, {len(pictures)}", *map(share, values), f"{np.median(values[-1]):.2f}"])
        if not kind.startswith("="):
            found.append([float((v > 1).mean()) for v in values])
    rows.append(["mean of the kinds without =", *(f"{100 * v:.0f}" for v in np.mean(found, axis=0)), ""])
    print_table([f"{name}: above the threshold, %", *fitted, "median of ours"], rows)


def sources(name: str, data: dict[str, list[Any]]) -> None:
    """Leaves one source out of training and validation and scores all its images."""
    rows = []
    for left in sorted({source for pairs in data.values() for _, source in pairs}):
        parts = {split: [p for p, source in data[split] if source != left] for split in SPLITS}
        away = [p for split in SPLITS for p, source in data[split] if source == left]
        at_home = novelty.fit(*([p for p, _ in data[split]] for split in SPLITS))
        own = np.asarray([at_home.unlike(p) for p, source in data["test"] if source == left])
        if min(map(len, parts.values())) < 30:
            rows.append([left, len(away), "too few of the others", "", f"{100 * (own > 1).mean():.1f}"])
            continue
        fitted = novelty.fit(*parts.values())
        seen = np.asarray([fitted.unlike(p) for p in away])
        rest = fitted.false_alarms["test"]
        rows.append(
            [left, len(away), f"{100 * (seen > 1).mean():.0f}", f"{100 * rest['rate']:.1f}"]
            + [f"{100 * (own > 1).mean():.1f} of {len(own)}" if len(own) else ""]
        )
    header = (
        f"{name}: left out",
        "images",
        "above the threshold, %",
        "test images of the others",
        "its own, if not left out",
    )
    print_table(header, rows)


def few(name: str, data: dict[str, list[Any]], other: list[Picture]) -> None:
    """False alarms on all test images, and the other modality, after fitting on few images drawn six times."""
    test = [p for p, _ in data["test"]]
    rows = []
    for n_train, n_val in ((36, 11), (60, 15), (100, 30), (200, 60), (400, 120)):
        alarms, told = [], []
        for draw in range(6):
            rng = np.random.default_rng(draw)
            chosen = [rng.permutation(len(data[s]))[:n] for s, n in (("train", n_train), ("val", n_val))]
            fitted = novelty.fit(*([data[s][i][0] for i in c] for s, c in zip(SPLITS, chosen, strict=False)), test)
            alarms.append(100 * fitted.false_alarms["test"]["rate"])
            told.append(np.mean([100 * (fitted.unlike(p) > 1) for p in other[:100]]))
        rows.append([f"{n_train} + {n_val}", f"{np.mean(alarms):.1f} ({max(alarms):.1f})", f"{np.mean(told):.0f}"])
    print_table((f"{name}: training + validation images", "false alarms, % (worst of 6)", "other modality, %"), rows)


def cost(fitted: novelty.Familiarity) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for shape in ((60, 60), (512, 512), (512, 512, 3), (4000, 4000)):
        picture = rng.integers(0, 256, shape, dtype=np.uint8)
        spent = []
        for _ in range(15):
            start = time.process_time()
            fitted.unlike(picture)
            spent.append(time.process_time() - start)
        rows.append([" x ".join(map(str, shape)), f"{1000 * float(np.median(spent)):.1f}"])
    print_table(("picture", "processor ms"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--sets", default="ct,xray,phantom")
    parser.add_argument("--parts", default="all")
    parser.add_argument("--network", action="store_true")
    args = parser.parse_args()
    parts = ["strangers", "sources", "few", "cost"] if args.parts == "all" else args.parts.split(",")
    volume = np.stack(
        [np.asarray(Image.open(f)) for f in sorted((args.shared / "data/covidx_ct_volume").glob("*.jpg"))]
    )
    scores: dict[str, Any] = {
        "thumbnail residual": residual,
        "statistics": gauss(statistics),
        "all in one": gauss(everything),
    }
    if args.network:
        scores["network"] = gauss(network())
    scores["ours"] = ours
    for name in args.sets.split(","):
        data = load(name, args.shared)
        order = np.random.default_rng(0).permutation(len(data["train"]))[:MOST]
        data["train"] = [data["train"][i] for i in order]
        other = [images.gray(p) for p, _ in load(OTHER[name], args.shared)["test"]]
        if "strangers" in parts:
            compare(name, data, other, volume, scores)
        if "sources" in parts:
            sources(name, data)
        if "few" in parts:
            few(name, data, other)
        if "cost" in parts:
            fitted = novelty.fit(*([p for p, _ in data[split]] for split in SPLITS))
            print(f"{name}: {fitted.threshold=:.3f} {fitted.false_alarms}\n")
            cost(fitted)


if __name__ == "__main__":
    main()
