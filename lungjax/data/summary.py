"""What a prepared data set holds, counted and checked, for people (markdown) and programs (JSON)."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.data.splits import SPLITS, parse_study

SHOWN = 20  # duplicates, skipped images and the like that are named; the counts are complete


def summarize(
    described: Mapping[str, Any],
    columns: Mapping[str, Sequence[str]],
    twins: Mapping[str, Any],
    skipped: Sequence[str],
    unstaged: Sequence[str],
    notes: Sequence[str],
    group_name: str,
) -> dict[str, Any]:
    """Returns the summary of an index: counts, sizes, copies, what they do to each protocol, warnings.

    `described` is the content of lungjax.json, `twins` what was found in `datasets.build.near_duplicates`.
    """
    classes = described["classes"]

    labels, groups, sources = (columns[k] for k in ("label", "group", "source"))
    width, height = (np.array(columns[k], dtype=np.str_).astype(int) for k in ("width", "height"))
    cells = {"clean": columns["split"]} | ({"study": columns["split_study"]} if described["study"] else {})
    result = {
        "name": described["name"],
        "images": len(labels),
        "classes": list(classes),
        "group_name": group_name,
        "groups": len(set(groups)),
        "study": described["study"],
        "stage": described["stage"],
        "size": described["size"],
        "protocols": {name: _counts(cells[name], labels, groups, classes) for name in cells},
        "sources": {s: dict(sorted(Counter(_select(labels, sources, s)).items())) for s in sorted(set(sources))},
        "sizes": {
            "width": [int(v) for v in (width.min(), np.median(width), width.max())],
            "height": [int(v) for v in (height.min(), np.median(height), height.max())],
            "common": [
                [f"{w} x {h}", n]
                for (w, h), n in Counter(zip(width.tolist(), height.tolist(), strict=True)).most_common(3)
            ],
        },
        "pixels": _statistics(columns),
        "window": described["window"],
        "duplicates": _duplicates(labels, columns["pixels"]),
        "twins": dict(twins),
        "groups_with_several_labels": _mixed(groups, labels),
        "skipped": list(skipped),
        "unstaged": list(unstaged),
        "notes": list(notes),
    }
    result["warnings"] = _warnings(result)
    return result


def _counts(
    cells: Sequence[str], labels: Sequence[str], groups: Sequence[str], classes: Sequence[str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Returns {split: {"images": {class: count}, "groups": {class: count}}} of a protocol's cells."""
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
    """Returns mean and standard deviation of pixel / 255 over the train images of the clean protocol, each alike."""
    train = np.array(columns["split"], dtype=np.str_) == "train"
    mean, std = (np.array(columns[key], dtype=np.str_).astype(float)[train] for key in ("mean", "std"))
    whole = float(mean.mean())
    return {"mean": round(whole, 4), "std": round(float(np.sqrt((std**2 + mean**2).mean() - whole**2)), 4)}


def _select(values: Sequence[str], keys: Sequence[str], key: str) -> list[str]:
    return [value for value, k in zip(values, keys, strict=True) if k == key]


def _duplicates(labels: Sequence[str], pixels: Sequence[str]) -> dict[str, int]:
    same = defaultdict(list)
    for i, digest in enumerate(pixels):
        same[digest].append(i)
    sets = [members for members in same.values() if len(members) > 1]
    conflicting = [m for m in sets if len({labels[i] for i in m}) > 1]
    return {
        "sets": len(sets),
        "images": sum(map(len, sets)),
        "sets_with_several_labels": len(conflicting),
    }


def _mixed(groups: Sequence[str], labels: Sequence[str]) -> int:
    found = Counter(group for group, _ in set(zip(groups, labels, strict=True)))
    return sum(count > 1 for count in found.values())


def _warnings(result: dict[str, Any]) -> list[str]:
    warnings = []
    copies = result["duplicates"]
    for split, found in result["twins"]["leaks"].get("study", {}).items():
        if found["any"]:
            warnings.append(
                f"protocol=study: {found['any']} of {found['images']} {split} images are known from train, so its "
                "scores will be too high"
            )
    if copies["sets_with_several_labels"]:
        warnings.append(f"{copies['sets_with_several_labels']} sets of equal images have different labels")
    if result["unstaged"]:
        warnings.append(f"in {len(result['unstaged'])} images the stage found no body or lung")
    if result["skipped"]:
        warnings.append(f"{len(result['skipped'])} images were skipped")
    for split in SPLITS:
        held = result["protocols"]["clean"].get(split, {"images": dict.fromkeys(result["classes"], 0)})
        empty = [c for c, n in held["images"].items() if not n]
        if empty:
            warnings.append(f"the {split} split has no image of {', '.join(empty)}")
    for source, found in result["sources"].items():
        if len(result["sources"]) > 1 and len(found) == 1:
            warnings.append(
                f"source {source or '(none)'} has one class only, {next(iter(found))}: see scores per source"
            )
    return warnings


def markdown(result: dict[str, Any]) -> str:
    """Returns a summary as markdown, also readable as it is on a terminal."""
    named, classes = result["group_name"], result["classes"]
    grouped = result["groups"] < result["images"]
    many = f", {result['groups']:,} {named}" if grouped else ""
    lines = [f"# {result['name']}", "", f"{result['images']:,} images{many}", ""]
    made = [f"in the stage {result['stage']}"] if result["stage"] else []
    made += ["{} x {} pixels (height x width)".format(*result["size"])] if result["size"] else []
    lines += [f"Stored {', '.join(made)}.", ""] if made else []
    for protocol, splits in result["protocols"].items():
        what = "protocol=clean, the default" if protocol == "clean" else f"protocol=study: {result['study']}"
        table = [
            [
                split,
                *held["images"].values(),
                sum(held["images"].values()),
                *(held["groups"].values() if grouped else ()),
            ]
            for split, held in splits.items()
        ]
        head = ["split", *classes, "images", *(f"{c} {named}" for c in classes if grouped)]
        lines += [what, "", *_table(head, table), ""]
    if len(result["sources"]) > 1:
        lines += [*_table(["source", *classes], [
            [source or "(none)", *(found.get(c, 0) for c in classes)]
            for source, found in result["sources"].items()
        ]), ""]  # fmt: skip
    sizes, copies, pixels = result["sizes"], result["duplicates"], result["pixels"]
    common = ", ".join(f"{size} ({n:,})" for size, n in sizes["common"])
    lines += [
        f"- Width {sizes['width'][0]} to {sizes['width'][2]} pixels, median {sizes['width'][1]}; height "
        f"{sizes['height'][0]} to {sizes['height'][2]}, median {sizes['height'][1]}; most common {common}",
        f"- Pixels of the train split, of 0..1: mean {pixels['mean']}, standard deviation {pixels['std']} "
        f"(--set=input.mean={pixels['mean']} --set=input.std={pixels['std']} where no weights bring their own)",
        f"- Equal images (same decoded pixels): {copies['images']} in {copies['sets']} sets; with "
        f"different labels: {copies['sets_with_several_labels']} sets",
        f"- Near twins (the same picture of different {named}): {result['twins']['near_pairs']} pairs",
        *(f"  - {pair}" for pair in result["twins"]["pairs"]),
        f"- protocol=clean leaves out {result['twins']['left_out']:,} of {result['images']:,} images",
        f"- {named.capitalize()} with images of several classes: {result['groups_with_several_labels']}",
        f"- Images in which the stage found no body or lung: {len(result['unstaged'])}"
        + (f": {', '.join(result['unstaged'][:SHOWN])}" if result["unstaged"] else ""),
        f"- Skipped images: {len(result['skipped'])}",
        *(f"  - {line}" for line in result["skipped"][:SHOWN]),
    ]
    if len(result["skipped"]) > SHOWN:
        lines.append("  - ... all are in summary.json")
    lines += [f"- {note}" for note in result["notes"]]
    lines += [f"- WARNING: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


def write(result: dict[str, Any], directory: Path) -> None:
    """Writes summary.json and summary.md into `directory`."""
    (directory / "summary.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (directory / "summary.md").write_text(markdown(result), "utf-8")
