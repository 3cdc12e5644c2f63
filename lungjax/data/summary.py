"""The summary of a prepared data set: counts and checks, as Markdown and JSON."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.data.splits import SPLITS, parse_study

MAX_IMBALANCE = 50  # train images of the most frequent class per image of the rarest
MIN_SIDE = 112  # pixels, half of a usual network input
MAX_NAMES = 20  # listed images; the counts are complete


def summarize(
    info: Mapping[str, Any],
    columns: Mapping[str, Sequence[str]],
    twins: Mapping[str, Any],
    skipped: Sequence[str],
    unstaged: Sequence[str],
    notes: Sequence[str],
    group_name: str,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the summary of an index: counts, sizes, warnings, and copies with their effect on each protocol.

    `info` is the content of lungjax.json, `twins` the summary of `datasets.build.near_duplicates.search`; `warnings`
    are added to those of this function.
    """
    classes = info["classes"]
    labels, groups, sources = (columns[k] for k in ("label", "group", "source"))
    width, height = (np.array(columns[k], dtype=np.str_).astype(int) for k in ("width", "height"))
    common = Counter(zip(width.tolist(), height.tolist(), strict=True)).most_common(3)
    by_source: dict[str, Counter[str]] = {source: Counter() for source in sorted(set(sources))}
    for source, label in zip(sources, labels, strict=True):
        by_source[source][label] += 1
    cells = {"clean": columns["split"]} | ({"study": columns["split_study"]} if info["study"] else {})
    labels_per_group = Counter(group for group, _ in set(zip(groups, labels, strict=True)))
    result = {
        "name": info["name"],
        "unit": "slice" if info["body"] or info.get("volumes") else "image",  # in reports
        "images": len(labels),
        "classes": list(classes),
        "group_name": group_name,
        "groups": len(set(groups)),
        "study": info["study"],
        "stage": info["stage"],
        "size": info["size"],
        "protocols": {name: _counts(cells[name], labels, groups, classes) for name in cells},
        "sources": {source: dict(sorted(counts.items())) for source, counts in by_source.items()},
        "sizes": {
            "width": [int(v) for v in (width.min(), np.median(width), width.max())],
            "height": [int(v) for v in (height.min(), np.median(height), height.max())],
            "common": [[f"{w} x {h}", n] for (w, h), n in common],
        },
        "pixels": _statistics(columns),
        "window": info["window"],
        "duplicates": _duplicates(labels, columns["pixels"]),
        "twins": dict(twins),
        "groups_with_several_labels": sum(count > 1 for count in labels_per_group.values()),
        "skipped": list(skipped),
        "unstaged": list(unstaged),
        "notes": list(notes),
    }
    result["warnings"] = [*warnings, *_warnings(result)]
    return result


def _counts(
    cells: Sequence[str], labels: Sequence[str], groups: Sequence[str], classes: Sequence[str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Returns {split: {"images": {class: count}, "groups": {class: count}}} from a protocol's column."""
    images: Counter[tuple[str, str]] = Counter()
    members = defaultdict(set)
    parsed = {cell: parse_study(cell) for cell in set(cells)}
    for cell, label, group in zip(cells, labels, groups, strict=True):
        for split, times in parsed[cell].items():
            images[split, label] += times
            members[split, label].add(group)
    used = {split for split, _ in images}
    return {
        split: {
            "images": {c: images[split, c] for c in classes},
            "groups": {c: len(members[split, c]) for c in classes},
        }
        for split in SPLITS
        if split in used
    }


def _statistics(columns: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns the mean and standard deviation of pixel / 255 over the clean train images; {} if there are none."""
    train = np.array(columns["split"], dtype=np.str_) == "train"
    if not train.any():
        return {}
    mean, std = (np.array(columns[key], dtype=np.str_).astype(float)[train] for key in ("mean", "std"))
    total = float(mean.mean())
    return {"mean": round(total, 4), "std": round(float(np.sqrt((std**2 + mean**2).mean() - total**2)), 4)}


def _duplicates(labels: Sequence[str], pixels: Sequence[str]) -> dict[str, int]:
    sets = [count for count in Counter(pixels).values() if count > 1]
    labels_per_set = Counter(digest for digest, _ in set(zip(pixels, labels, strict=True)))
    conflicting = sum(count > 1 for count in labels_per_set.values())
    return {"sets": len(sets), "images": sum(sets), "sets_with_several_labels": conflicting}


def _warnings(result: dict[str, Any]) -> list[str]:
    warnings = []
    for split, leaks in result["twins"]["leaks"].get("study", {}).items():
        if leaks["any"]:
            share = f"{leaks['any']} of {leaks['images']}"
            warnings.append(f"protocol=study: {share} {split} images leak from train, so its scores are too high")
    if conflicting := result["duplicates"]["sets_with_several_labels"]:
        warnings.append(f"{conflicting} sets of identical images have conflicting labels")
    if result["unstaged"]:
        warnings.append(f"images without a detected body or lung: {len(result['unstaged'])}")
    if result["skipped"]:
        warnings.append(f"skipped images: {len(result['skipped'])}")
    given = result["protocols"]["clean"]
    for split in SPLITS if set(given) != {"test"} else ("test",):
        counts = given.get(split, {"images": {}})["images"]
        if empty := [c for c in result["classes"] if not counts.get(c)]:
            warnings.append(f"the {split} split has no images labeled {', '.join(empty)}")
        if single := [c for c in result["classes"] if counts.get(c) == 1 and split != "train"]:
            warnings.append(f"the {split} split has a single image labeled {', '.join(single)}: its scores say little")
        least, most = min(counts.values(), default=0), max(counts.values(), default=0)
        if split == "train" and least and most >= MAX_IMBALANCE * least:
            rare, frequent = (next(c for c, n in counts.items() if n == count) for count in (least, most))
            warnings.append(f"the train split is imbalanced: {least:,} images of {rare}, {most:,} of {frequent}")
    width, height = (result["sizes"][side][1] for side in ("width", "height"))
    if max(width, height) < MIN_SIDE and not result["size"]:
        size = f"a median of {width} x {height} pixels"
        warnings.append(f"small images, {size}: use the originals, or an input.size below 224 x 224")
    for name in result["classes"] if len(result["sources"]) > 1 else ():
        single = [source or "(none)" for source, counts in result["sources"].items() if list(counts) == [name]]
        names = f"{', '.join(single[:MAX_NAMES])}{', ...' if len(single) > MAX_NAMES else ''}"
        if single:
            warnings.append(f"sources with images of {name} only ({len(single)}), see scores per source: {names}")
    return warnings


def markdown(result: dict[str, Any]) -> str:
    """Returns a summary as Markdown with aligned tables."""
    name, classes = result["group_name"], result["classes"]
    with_groups = result["groups"] < result["images"]
    groups = f", {result['groups']:,} {name}" if with_groups else ""
    lines = [f"# {result['name']}", "", f"{result['images']:,} images{groups}", ""]
    stored = [f"in the stage {result['stage']}"] if result["stage"] else []
    stored += ["{} x {} pixels (height x width)".format(*result["size"])] if result["size"] else []
    lines += [f"Stored {', '.join(stored)}.", ""] if stored else []
    for protocol, splits in result["protocols"].items():
        head = ["split", *classes, "images", *(f"{c} {name}" for c in classes if with_groups)]
        rows = [
            [split, *n["images"].values(), sum(n["images"].values()), *(n["groups"].values() if with_groups else ())]
            for split, n in splits.items()
        ]
        title = "protocol=clean, the default" if protocol == "clean" else f"protocol=study: {result['study']}"
        lines += [title, "", *_table(head, rows), ""]
    if len(result["sources"]) > 1:
        rows = [[source or "(none)", *(n.get(c, 0) for c in classes)] for source, n in result["sources"].items()]
        lines += [*_table(["source", *classes], rows), ""]
    (w0, w1, w2), (h0, h1, h2) = result["sizes"]["width"], result["sizes"]["height"]
    copies, twins, pixels = result["duplicates"], result["twins"], result["pixels"]
    common = ", ".join(f"{size} ({n:,})" for size, n in result["sizes"]["common"])
    without = ", ".join(result["unstaged"][:MAX_NAMES])
    lines += [
        f"- Width {w0} to {w2} pixels, median {w1}; height {h0} to {h2}, median {h1}; most common {common}",
        *(
            f"- Pixels of the train split, in 0..1: mean {mean}, standard deviation {std} "
            f"(--set=input.mean={mean} --set=input.std={std}, unless the weights define them)"
            for mean, std in ([pixels.values()] if pixels else [])
        ),
        f"- Exact copies: {copies['images']} images in {copies['sets']} sets, "
        f"{copies['sets_with_several_labels']} of them with different labels",
        f"- Near duplicates in different {name}: {twins['near_pairs']} pairs",
        *(f"  - {pair}" for pair in twins["pairs"]),
        f"- protocol=clean removes {twins['left_out']:,} of {result['images']:,} images",
        f"- {name.capitalize()} with images of several classes: {result['groups_with_several_labels']}",
        f"- Images without a detected body or lung: {len(result['unstaged'])}{without and ': ' + without}",
        f"- Skipped images: {len(result['skipped'])}",
        *(f"  - {line}" for line in result["skipped"][:MAX_NAMES]),
        *(["  - ... (all in summary.json)"] if len(result["skipped"]) > MAX_NAMES else []),
        *(f"- {note}" for note in result["notes"]),
        *(f"- WARNING: {warning}" for warning in result["warnings"]),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return [
        f"| {' | '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))} |"
        for row in cells
    ]


def write(result: dict[str, Any], directory: Path) -> None:
    """Writes summary.json and summary.md into `directory`."""
    (directory / "summary.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (directory / "summary.md").write_text(markdown(result), "utf-8")
