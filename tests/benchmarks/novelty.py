"""Measures which out-of-distribution images `lungjax.evaluation.novelty` and a score from network features detect.

    python -m tests.benchmarks.novelty --shared=FOLDER [--sets=ct,xray,phantom] [--parts=outliers,sources,few]
        [--network] [--images=1000] [--outliers=150]

FOLDER/data has `covidx_ct_volume`, and `ct` and `xray`, each with a `labels.csv` (columns path, split and group; no
group is in two splits). Most outliers are modified test images; --outliers limits their number per kind.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image, ImageDraw

from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions, phantom_ct
from lungjax.evaluation import novelty
from tests.benchmarks import harness

Picture = np.ndarray
Score = Callable[[Sequence[Picture]], np.ndarray]
COLOR = "astronaut coffee chelsea color rocket retina ihc hubble_deep_field motorcycle_left motorcycle_right"
GRAY = "camera coins moon page text brick gravel grass cell phantom clock_motion"
OTHER = {"ct": "xray", "xray": "ct", "phantom": "xray"}
SPLITS = ("train", "val", "test")


def load(name: str, shared: Path) -> dict[str, list[tuple[Picture, str]]]:
    """Returns the images and their sources by split."""
    pictures: dict[str, list[tuple[Picture, str]]] = {split: [] for split in SPLITS}
    folder = shared / "data" / name
    if name == "phantom":
        for example in phantom_ct.listing(None, "default", PrepareOptions()).examples:
            pictures[example.split].append((images.decode(example.image(), None), example.source))
        return pictures
    for row in csv.DictReader((folder / "labels.csv").read_text().splitlines()):
        picture = images.decode((folder / row["path"]).read_bytes(), None)
        pictures[row["split"]].append((picture, row.get("source") or Path(row["path"]).name.split("_")[0]))
    return pictures


def photographs(names: str) -> list[Picture]:
    folder = Path(skimage.__file__).parent / "data"
    return [np.asarray(Image.open(next(folder.glob(f"{name}.*g"))).convert("RGB")) for name in names.split()]


def resized(picture: Picture, width: float, height: float) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((int(width), int(height)), Image.Resampling.BILINEAR))


def in_color(picture: Picture) -> Picture:
    return np.repeat(picture[..., None], 3, axis=2)


def window(picture: Picture, low: float, high: float) -> Picture:
    return np.clip((picture.astype(float) - low) * 255 / (high - low), 0, 255).astype(np.uint8)


def text_page(background: int, ink: int) -> Image.Image:
    page = Image.new("L", (1280, 800), background)
    for line in range(30):
        words = f"Line {line}: no focal opacity, heart size normal. " * 4
        ImageDraw.Draw(page).text((20, 10 + 25 * line), words, fill=ink)
    return page


def screenshot(picture: Picture) -> Picture:
    page = text_page(240, 20).convert("RGB")
    page.paste((40, 60, 120), (0, 0, 1280, 60))
    page.paste(Image.fromarray(in_color(picture)).resize((560, 560)), (420, 160))
    return np.asarray(page)


def heat_map(picture: Picture) -> Picture:
    row, column = np.mgrid[: picture.shape[0], : picture.shape[1]] / np.reshape(picture.shape, (2, 1, 1))
    heat = np.exp(-(((row - 0.45) / 0.2) ** 2 + ((column - 0.3) / 0.2) ** 2))
    jet = np.stack([np.clip(1.5 - abs(4 * heat - k), 0, 1) for k in (3, 2, 1)], -1) * 255
    return (0.5 * in_color(picture) + 0.5 * jet).astype(np.uint8)


def jpeg(picture: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(in_color(picture)).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer))


def outliers(
    test: Sequence[Picture], other: Sequence[Picture], volume: Picture, count: int
) -> Iterator[tuple[str, list[Picture]]]:
    """Yields the name and up to `count` images of each kind; those named "= ..." should score like test images.

    `other` contains images of the other modality; `volume` [slices, H, W] is a CT from the shoulders down.
    """
    rng = np.random.default_rng(0)
    some = [test[i] for i in rng.permutation(len(test))[:count]]
    photos = photographs(COLOR)
    yield "the other modality", [other[i] for i in rng.permutation(len(other))[:count]]
    yield "color photographs", photos
    yield "gray photographs", [images.gray(p) for p in (*photographs(GRAY), *photos)]
    yield "blank, 0 to 255", [np.full((256, 256), v, np.uint8) for v in (0, 1, 64, 128, 200, 255)]
    yield "noise alone", [rng.integers(0, 256, (256, 256, *c), dtype=np.uint8) for c in [()] * 5 + [(3,)] * 5]
    yield "page of text", [np.asarray(text_page(245, 20)), np.asarray(text_page(30, 230))]
    yield "screenshot of a viewer", [screenshot(p) for p in some[:60]]
    small = [resized(p, 256, 256) for p in some]
    fours = zip(small[::4], small[1::4], small[2::4], small[3::4], strict=False)
    yield "four images in one", [np.block([[a, b], [c, d]]) for a, b, c, d in fours]
    changes: dict[str, Callable[[Picture], Picture]] = {
        "color heat map over the image": heat_map,
        "inverted": lambda p: 255 - p,
        "rotated by 90 degrees": np.rot90,
        "upside down": lambda p: p[::-1],
        "mirrored": lambda p: p[:, ::-1],
        "soft-tissue window": lambda p: window(p, 110, 190),
        "over-exposed": lambda p: window(p, 0, 90),
        "under-exposed": lambda p: window(p, 0, 730),
        "a twelfth of the width, enlarged": lambda p: resized(resized(p, 12, 12), p.shape[1], p.shape[0]),
        "noise of 60 gray levels added": lambda p: np.clip(p + rng.normal(0, 60, p.shape), 0, 255).astype(np.uint8),
        "upper half black": lambda p: np.where(np.arange(len(p))[:, None] < len(p) // 2, 0, p).astype(np.uint8),
        "white margin, as on paper": lambda p: np.pad(p, [(n // 4, n // 4) for n in p.shape], constant_values=245),
        "stretched to twice the width": lambda p: resized(p, 2 * p.shape[1], p.shape[0]),
        "= half the size": lambda p: resized(p, p.shape[1] / 2, p.shape[0] / 2),
        "= twice the size": lambda p: resized(p, 2 * p.shape[1], 2 * p.shape[0]),
        "= saved as color JPEG, quality 50": jpeg,
        "= 10 gray levels brighter": lambda p: window(p, -10, 245),
    }
    for name, change in changes.items():
        yield name, [change(p) for p in some]
    for part, place in (("lungs", slice(6, 42)), ("shoulders", slice(3)), ("abdomen", slice(-3, None))):
        yield f"volume: axial, {part}", list(volume[place])
    for plane, axis in (("coronal", 1), ("sagittal", 2)):
        yield f"volume: {plane}", [resized(volume.take(k, axis), 512, 350) for k in range(160, 340, 10)]


def fit_ours(train: Sequence[Picture], val: Sequence[Picture]) -> Score:
    fitted = novelty.fit(train, val, [])
    return lambda pictures: np.asarray([fitted.score(p) for p in pictures])


def fit_network(train: Sequence[Picture], val: Sequence[Picture]) -> Score:
    """Fits a published score and a range check of intensity, color and aspect, with half the false alarms each.

    The score is the Mahalanobis distance (Lee et al., arXiv 1807.03888, covariance shrunk by a tenth) of the pooled
    ImageNet features of EfficientNet-Lite0.
    """
    import jax

    import lungjax

    net, variables, spec = lungjax.create("efficientnet_lite0", weights="imagenet", size=160)
    run = jax.jit(lambda x: net.apply(variables, x, train=False)[1]["last"].mean((1, 2)))

    def features(pictures: Sequence[Picture]) -> np.ndarray:
        colored = (in_color(p) if p.ndim == 2 else p for p in pictures)
        return np.concatenate([run(lungjax.preprocess(p, spec).reshape(1, *spec.size, 3)) for p in colored])

    def simple(pictures: Sequence[Picture]) -> np.ndarray:
        return np.asarray([[*m["intensity"][[0, 3, 6]], *m["detail"][[5, 6]]] for m in map(novelty.measure, pictures)])

    reference = features(train)
    mean, deviation = reference.mean(0), np.maximum(reference.std(0), 0.1 * reference.std(0).mean())
    covariance = 0.9 * np.cov(((reference - mean) / deviation).T) + 0.1 * np.eye(len(mean))
    root = np.linalg.inv(np.linalg.cholesky(covariance))
    low, high = np.quantile(simple(train), [0.005, 0.995], axis=0)

    def scores(pictures: Sequence[Picture]) -> np.ndarray:
        distance = np.linalg.norm(((features(pictures) - mean) / deviation) @ root.T, axis=1)
        beyond = (np.abs(simple(pictures) - (low + high) / 2) / np.maximum((high - low) / 2, 4)).max(1)
        return np.stack([distance, beyond])

    thresholds = np.quantile(scores(val), 1 - novelty.FALSE_ALARMS / 2, axis=1, method="higher")
    return lambda pictures: (scores(pictures) / thresholds[:, None]).max(0)


def percent(scores: np.ndarray) -> str:
    return f"{100 * (scores > 1).mean():.{1 if len(scores) > 150 else 0}f}"


def compare(name: str, data: dict[str, list[Any]], kinds: Any, fits: dict[str, Any]) -> None:
    train, val, test = ([p for p, _ in data[split]] for split in SPLITS)
    scores = {label: fit(train, val) for label, fit in fits.items()}
    rows = [
        [kind, *(percent(score(pictures)) for score in scores.values())]
        for kind, pictures in [(f"test images, {len(test)}", test), *kinds]
    ]
    print(harness.table([f"{name}: above the threshold, %", *scores], rows) + "\n", flush=True)


def sources(name: str, data: dict[str, list[Any]]) -> None:
    """Prints the detection rate of each source when it is left out of training and validation."""
    rows = []
    for left in sorted({source for pairs in data.values() for _, source in pairs}):
        parts = [[p for p, source in data[split] if source != left] for split in SPLITS]
        unseen = [p for split in SPLITS for p, source in data[split] if source == left]
        fitted = novelty.fit(*parts)
        detected = percent(np.asarray([fitted.score(p) for p in unseen]))
        alarms = 100 * fitted.rates["false_alarms"]["test"]["rate"]
        rows.append([f"{name}: {left}", len(unseen), detected, f"{alarms:.1f}"])
    heads = ("source left out", "images", "above the threshold, %", "test images of the others, %")
    print(harness.table(heads, rows) + "\n", flush=True)


def few(name: str, data: dict[str, list[Any]], other: list[Picture]) -> None:
    """Prints the rates of false alarms and of detections after fitting on only a few images, over six random draws."""
    test = [p for p, _ in data["test"]]
    rows = []
    for counts in ((36, 11), (60, 15), (100, 30), (200, 60), (400, 120)):
        alarms, detected = [], []
        for seed in range(6):
            rng = np.random.default_rng(seed)
            splits = zip((data["train"], data["val"]), counts, strict=True)
            drawn = [[pairs[i][0] for i in rng.permutation(len(pairs))[:n]] for pairs, n in splits]
            fitted = novelty.fit(*drawn, test)
            alarms.append(100 * fitted.rates["false_alarms"]["test"]["rate"])
            detected.append(np.mean([100 * (fitted.score(p) > 1) for p in other[:100]]))
        cells = [f"{np.mean(alarms):.1f} ({max(alarms):.1f})", f"{np.mean(detected):.0f}"]
        rows.append([f"{name}: {counts[0]} + {counts[1]}", *cells])
    heads = ("training + validation images", "false alarms, % (highest of 6)", "other modality detected, %")
    print(harness.table(heads, rows) + "\n", flush=True)


def main() -> None:
    args = harness.parse(
        __doc__, ["shared"], shared=Path, sets=["ct", "xray", "phantom"], parts=["outliers", "sources", "few"],
        network=False, images=1000, outliers=150,
    )  # fmt: skip
    files = sorted((args.shared / "data/covidx_ct_volume").glob("*.jpg"))
    volume = np.stack([np.asarray(Image.open(file)) for file in files])
    fits = {"network": fit_network, "ours": fit_ours} if args.network else {"ours": fit_ours}
    for name in args.sets:
        data = load(name, args.shared)
        order = np.sort(np.random.default_rng(0).permutation(len(data["train"]))[: args.images])
        data["train"] = [data["train"][i] for i in order]
        other = [images.gray(p) for p, _ in load(OTHER[name], args.shared)["test"]]
        if "outliers" in args.parts:
            compare(name, data, outliers([images.gray(p) for p, _ in data["test"]], other, volume, args.outliers), fits)
        if "sources" in args.parts and name != "phantom":
            sources(name, data)
        if "few" in args.parts:
            few(name, data, other)


if __name__ == "__main__":
    main()
