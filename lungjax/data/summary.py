"""What a prepared data set holds, counted and checked, for people (markdown) and programs (JSON)."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.data.prepared import SPLITS

SHOWN = 20  # duplicates, skipped images and the like that are named; the counts are complete


def summarize(
    name: str,
    classes: Sequence[str],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    window: tuple[float, float] | None,
    skipped: Sequence[str],
    notes: Sequence[str],
    group_name: str,
) -> dict[str, Any]:
    """Returns the summary of index rows: counts, sizes, equal images, groups in several splits, warnings."""
    place = {column: i for i, column in enumerate(header)}

    def column(key: str) -> list[str]:
        return [row[place[key]] for row in rows]

    files, labels, splits, groups, sources = (column(k) for k in ("file", "label", "split", "group", "source"))
    counts = Counter(zip(splits, labels, strict=True))
    group_sets = defaultdict(set)
    for split, label, group in zip(splits, labels, groups, strict=True):
        group_sets[split, label].add(group)
    used = [split for split in SPLITS if split in set(splits)]
    width, height = (np.array(column(k), dtype=np.str_).astype(int) for k in ("width", "height"))
    result = {
        "name": name,
        "images": len(rows),
        "classes": list(classes),
        "group_name": group_name,
        "groups": len(set(groups)),
        "splits": {s: {c: counts[s, c] for c in classes} for s in used},
        "groups_by_split": {s: {c: len(group_sets[s, c]) for c in classes} for s in used},
        "sources": {s: dict(sorted(Counter(_select(labels, sources, s)).items())) for s in sorted(set(sources))},
        "sizes": {
            "width": [int(v) for v in (width.min(), np.median(width), width.max())],
            "height": [int(v) for v in (height.min(), np.median(height), height.max())],
            "common": [
                [f"{w} x {h}", n]
                for (w, h), n in Counter(zip(width.tolist(), height.tolist(), strict=True)).most_common(3)
            ],
        },
        "window": window,
        "duplicates": _duplicates(files, labels, splits, column("pixels")),
        "groups_in_several_splits": _torn(groups, splits),
        "groups_with_several_labels": _mixed(groups, labels),
        "skipped": list(skipped),
        "notes": list(notes),
    }
    result["warnings"] = _warnings(result)
    return result


def _select(values: Sequence[str], keys: Sequence[str], key: str) -> list[str]:
    return [value for value, k in zip(values, keys, strict=True) if k == key]


def _duplicates(
    files: Sequence[str], labels: Sequence[str], splits: Sequence[str], pixels: Sequence[str]
) -> dict[str, Any]:
    same = defaultdict(list)
    for i, digest in enumerate(pixels):
        same[digest].append(i)
    sets = [members for members in same.values() if len(members) > 1]
    across = [m for m in sets if len({splits[i] for i in m}) > 1]
    conflicting = [m for m in sets if len({labels[i] for i in m}) > 1]
    worst_first = sorted(sets, key=lambda m: (m not in conflicting, m not in across))
    return {
        "sets": len(sets),
        "images": sum(map(len, sets)),
        "sets_across_splits": len(across),
        "sets_with_several_labels": len(conflicting),
        "examples": [[f"{files[i]} ({splits[i]}, {labels[i]})" for i in m[:6]] for m in worst_first[:SHOWN]],
    }


def _torn(groups: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    where = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        where[group].add(split)
    torn = sorted(group for group, found in where.items() if len(found) > 1)
    return {"count": len(torn), "examples": torn[:SHOWN]}


def _mixed(groups: Sequence[str], labels: Sequence[str]) -> int:
    found = Counter(group for group, _ in set(zip(groups, labels, strict=True)))
    return sum(count > 1 for count in found.values())


def _warnings(result: dict[str, Any]) -> list[str]:
    warnings = []
    torn, copies, named = result["groups_in_several_splits"], result["duplicates"], result["group_name"]
    if torn["count"]:
        warnings.append(f"{torn['count']} {named} are in more than one split, so test scores will be too high")
    if copies["sets_across_splits"]:
        warnings.append(f"{copies['sets_across_splits']} sets of equal images reach over two splits")
    if copies["sets_with_several_labels"]:
        warnings.append(f"{copies['sets_with_several_labels']} sets of equal images have different labels")
    if result["skipped"]:
        warnings.append(f"{len(result['skipped'])} images were skipped")
    for split in SPLITS:
        empty = [c for c, n in result["splits"].get(split, dict.fromkeys(result["classes"], 0)).items() if not n]
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
    lines = [f"# {result['name']}", "", f"{result['images']:,} images, {result['groups']:,} {named}", ""]
    head = ["split", *classes, "images", *(f"{c} {named}" for c in classes)]
    table = [
        [split, *counts.values(), sum(counts.values()), *result["groups_by_split"][split].values()]
        for split, counts in result["splits"].items()
    ]
    lines += _table(head, table)
    if len(result["sources"]) > 1:
        lines += ["", *_table(["source", *classes], [
            [source or "(none)", *(found.get(c, 0) for c in classes)]
            for source, found in result["sources"].items()
        ])]  # fmt: skip
    sizes, copies = result["sizes"], result["duplicates"]
    common = ", ".join(f"{size} ({n:,})" for size, n in sizes["common"])
    lines += [
        "",
        f"- Width {sizes['width'][0]} to {sizes['width'][2]} pixels, median {sizes['width'][1]}; height "
        f"{sizes['height'][0]} to {sizes['height'][2]}, median {sizes['height'][1]}; most common {common}",
        f"- Equal images (same decoded pixels): {copies['images']} in {copies['sets']} sets; over two "
        f"splits: {copies['sets_across_splits']} sets; with different labels: "
        f"{copies['sets_with_several_labels']} sets",
        *(f"  - {' = '.join(members)}" for members in copies["examples"]),
        f"- {named.capitalize()} in more than one split: {result['groups_in_several_splits']['count']}"
        + _listed(result["groups_in_several_splits"]["examples"]),
        f"- {named.capitalize()} with images of several classes: {result['groups_with_several_labels']}",
        f"- Skipped images: {len(result['skipped'])}",
        *(f"  - {line}" for line in result["skipped"][:SHOWN]),
    ]
    if len(result["skipped"]) > SHOWN:
        lines.append("  - ... all are in summary.json")
    lines += [f"- {note}" for note in result["notes"]]
    lines += [f"- WARNING: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
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
