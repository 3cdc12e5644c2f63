"""The summary of a prepared data set: counts and checks, as Markdown and JSON."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.config.schema import parse_json
from lungjax.data import labels, leakage, prepared, statistics
from lungjax.data.prepared import Prepared
from lungjax.data.splits import SPLITS
from lungjax.data.statistics import MAX_CATEGORIES

FILE = "summary.json"
MAX_IMBALANCE = 50  # train images of the most frequent class per image of the rarest
MIN_SIDE = 112  # pixels, half of a usual network input
MAX_NAMES = 20  # listed images and pairs; the counts are complete


def summarize(
    data: Prepared,
    info: Mapping[str, Any],
    skipped: Sequence[str],
    unstaged: Sequence[str],
    notes: Sequence[str],
    group_name: str,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the summary of a data set; `info` is the content of lungjax.json, `warnings` precede its own warnings."""
    columns, classes = data.columns, data.classes
    width, height = columns["width"], columns["height"]
    sources, of_source = _count(data, columns["source"])
    kinds, unknown = labels.codes(columns["label"]), (columns["label"] == labels.UNKNOWN).sum(axis=0)
    sizes, of_size, _ = _distinct(np.column_stack([width, height]), kinds)
    _, of_group, labels_of_group = _distinct(columns["group"], kinds)
    _, of_picture, labels_of_picture = _distinct(columns["pixels"], kinds)
    copied = of_picture > 1
    protocols = {name: replace(data, protocol=name) for name in ("clean", *(["study"] if info["study"] else []))}
    leaks = {name: leakage.leaks(view) for name, view in protocols.items()}
    leak_notes = [leakage.leak_notes(counts, f"protocol={name}", group_name) for name, counts in leaks.items()]
    result = {
        "name": data.name,
        "unit": "slice" if data.body or data.volumes else "image",  # in reports
        "images": len(width),
        "classes": list(classes),
        # Images with an unknown label by finding; {} if each image has one class.
        "unknown": dict(zip(classes, unknown.tolist(), strict=True)) if unknown.ndim else {},
        "group_name": group_name,
        "groups": len(of_group),
        "study": info["study"],
        "stage": info["stage"],
        "size": info["size"],
        "protocols": {name: split_counts(view) for name, view in protocols.items()},
        "sources": {
            source: {name: n for name, n in zip(classes, counts, strict=True) if n}
            for source, counts in sorted(zip(sources.tolist(), of_source.tolist(), strict=True))
        },
        "sizes": {
            "width": [int(v) for v in (width.min(), np.median(width), width.max())],
            "height": [int(v) for v in (height.min(), np.median(height), height.max())],
            "common": [[f"{w} x {h}", int(n)] for (w, h), n in zip(sizes[:3], of_size[:3], strict=True)],
        },
        "pixels": _pixel_statistics(data),
        "window": info["window"],
        "duplicates": {
            "sets": int(copied.sum()),
            "images": int(of_picture[copied].sum()),
            "sets_with_several_labels": int((labels_of_picture > 1).sum()),
        },
        "twins": {
            "near_pairs": len(data.near),
            "left_out": int((columns["split"] == "").sum()),
            "leaks": leaks,
            "pairs": _worst_pairs(list(protocols.values())[-1]),
        },
        "groups_with_several_labels": int((labels_of_group > 1).sum()),
        "skipped": list(skipped),
        "unstaged": list(unstaged),
        "notes": [*notes, *itertools.chain(*leak_notes)],
    }
    result["warnings"] = [*warnings, *_warnings(result)]
    return result


def _distinct(values: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the distinct `values`, most frequent first, and for each the numbers of images and of `kinds`."""
    names, member, images = np.unique(values, axis=0, return_inverse=True, return_counts=True)
    pairs = np.unique(np.column_stack([member.ravel(), kinds]), axis=0)  # a table of all would not fit in memory
    order = np.argsort(-images, kind="stable")
    return names[order], images[order], np.bincount(pairs[:, 0], minlength=len(names))[order]


def _count(data: Prepared, values: np.ndarray, rows: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    return statistics.count_values(values[rows], data.columns["label"][rows], len(data.classes))


def split_counts(data: Prepared) -> dict[str, dict[str, Any]]:
    """Returns {split: {"images": {class: count}, "groups": {class: count}, "all": images}} of the nonempty splits."""
    result = {}
    for split in SPLITS:
        rows = data.rows(split)
        if len(rows):
            counts = _count(data, data.columns["group"], rows)[1]
            parts = {"images": counts.sum(axis=0), "groups": np.count_nonzero(counts, axis=0)}
            by_class = {key: dict(zip(data.classes, part.tolist(), strict=True)) for key, part in parts.items()}
            result[split] = by_class | {"all": len(rows)}
    return result


def characteristics(data: Prepared, rows: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Returns images, groups and kept columns of each split, and of "all", for the table of a publication.

    `rows` are those of each split, by default all splits of the protocol. `columns` has, for each column of numbers,
    median and quartiles of the groups and how many lack it; for others, how many groups have each value. Columns with
    over MAX_CATEGORIES different texts are omitted.
    """
    splits = {name: np.unique(part) for name, part in (rows or {s: data.rows(s) for s in SPLITS}).items() if len(part)}
    splits = {"all": np.unique(np.concatenate([*splits.values()]))} | splits
    names = ["source", *(name for name in data.columns if name not in prepared.COLUMNS)]
    result: dict[str, Any] = {}
    for split, part in splits.items():
        groups = data.columns["group"][part]
        first = part[np.unique(groups, return_index=True)[1]]  # an image of each group
        columns: dict[str, Any] = {}
        for name in names:
            values = data.columns[name]
            parsed = statistics.numbers(values)
            if parsed is not None and (known := parsed[first][~np.isnan(parsed[first])]).size:
                low, median, high = np.percentile(known, [25, 50, 75]).tolist()
                columns[name] = {"median": median, "low": low, "high": high, "missing": len(first) - len(known)}
            elif parsed is None and len(kinds := np.unique(statistics.categories(values))) <= MAX_CATEGORIES:
                pairs = {*zip(groups.tolist(), statistics.categories(values[part]).tolist(), strict=True)}
                counts = Counter(value for _, value in pairs)
                columns[name] = {value: counts[value] for value in kinds.tolist()}
        known_columns = {name: c for name, c in columns.items() if [*c] != [statistics.UNKNOWN]}
        result[split] = {"images": len(part), "groups": len(first), "columns": known_columns}
    return result


def _pixel_statistics(data: Prepared) -> dict[str, float]:
    """Returns the mean and standard deviation of pixel / 255 over the clean train images; {} if there are none."""
    train = data.columns["split"] == "train"
    if not train.any():
        return {}
    mean, std = (data.columns[key][train].astype(float) for key in ("mean", "std"))
    total = float(mean.mean())
    return {"mean": round(total, 4), "std": round(float(np.sqrt((std**2 + mean**2).mean() - total**2)), 4)}


def _worst_pairs(data: Prepared) -> list[str]:
    """Returns up to MAX_NAMES pairs, worst first: "a.png (test, COVID) = b.png (train, Normal)"; "~" if only near."""
    cells, columns = statistics.cells(data), data.columns
    pairs = np.concatenate([statistics.copies(data), data.near])
    pairs = statistics.worst_first(pairs[(cells[pairs] != "").all(axis=1)], data)[0]
    exact = columns["pixels"][pairs[:, 0]] == columns["pixels"][pairs[:, 1]]
    # All pairs of a set of copies have the same first image.
    first = np.unique(np.where(exact, pairs[:, 0], -1 - np.arange(len(pairs))), return_index=True)[1]
    lines = []
    for at in np.sort(first)[:MAX_NAMES]:
        one, other = (
            f"{columns['file'][row]} ({cells[row]}, {labels.text(columns['label'][row], data.classes)})"
            for row in pairs[at]
        )
        lines.append(f"{one} {'=' if exact[at] else '~'} {other}")
    return lines


def _warnings(result: dict[str, Any]) -> Iterator[str]:
    for split, leaks in result["twins"]["leaks"].get("study", {}).items():
        if leaks["any"]:
            share = f"{leaks['any']} of {leaks['images']}"
            yield f"protocol=study: {share} {split} images leak from train, so its scores are too high"
    if conflicting := result["duplicates"]["sets_with_several_labels"]:
        yield f"{conflicting} sets of identical images have conflicting labels"
    if result["unstaged"]:
        yield f"images without a detected body or lung: {len(result['unstaged'])}"
    if result["skipped"]:
        yield f"skipped images: {len(result['skipped'])}"
    given = result["protocols"]["clean"]
    for split in SPLITS if "train" in given else given:
        counts = given.get(split, {"images": {}})["images"]
        if empty := [c for c in result["classes"] if not counts.get(c)]:
            yield f"the {split} split has no images labeled {', '.join(empty)}"
        if single := [c for c in result["classes"] if counts.get(c) == 1 and split != "train"]:
            yield f"the {split} split has a single image labeled {', '.join(single)}: its scores say little"
        least, most = min(counts.values(), default=0), max(counts.values(), default=0)
        if split == "train" and least and most >= MAX_IMBALANCE * least:
            rare, frequent = (next(c for c, n in counts.items() if n == count) for count in (least, most))
            yield f"the train split is imbalanced: {least:,} images of {rare}, {most:,} of {frequent}"
    width, height = (result["sizes"][side][1] for side in ("width", "height"))
    if max(width, height) < MIN_SIDE and not result["size"]:
        size = f"a median of {width} x {height} pixels"
        yield f"small images, {size}: use the originals, or an input.size below 224 x 224"
    for name in result["classes"] if len(result["sources"]) > 1 and not result["unknown"] else ():
        single = [source or "(none)" for source, counts in result["sources"].items() if list(counts) == [name]]
        names = f"{', '.join(single[:MAX_NAMES])}{', ...' if len(single) > MAX_NAMES else ''}"
        if single:
            yield f"sources with images of {name} only ({len(single)}), see scores per source: {names}"


def markdown(result: dict[str, Any]) -> str:
    """Returns a summary as Markdown with aligned tables."""
    name, classes, unknown = result["group_name"], result["classes"], result["unknown"]
    with_groups = result["groups"] < result["images"]
    groups = f", {result['groups']:,} {name}" if with_groups else ""
    lines = [f"# {result['name']}", "", f"{result['images']:,} images{groups}", ""]
    stored = [f"in the stage {result['stage']}"] if result["stage"] else []
    stored += ["{} x {} pixels (height x width)".format(*result["size"])] if result["size"] else []
    lines += [f"Stored {', '.join(stored)}.", ""] if stored else []
    for protocol, splits in result["protocols"].items():
        head = ["split", *classes, "images", *(f"{c} {name}" for c in classes if with_groups)]
        rows = [
            [split, *n["images"].values(), n["all"], *(n["groups"].values() if with_groups else ())]
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
        f"- {name.capitalize()} with images of several {'labels' if result['unknown'] else 'classes'}: "
        f"{result['groups_with_several_labels']}",
        *([f"- Unknown labels: {', '.join(f'{k} {n:,}' for k, n in unknown.items())}"] if unknown else ()),
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
    (directory / FILE).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (directory / "summary.md").write_text(markdown(result), "utf-8")


def read(directory: Path) -> dict[str, Any]:
    """Returns the summary of a prepared data set. Raises ValueError if summary.json is missing or damaged."""
    with prepared.damage(directory / FILE):
        return parse_json((directory / FILE).read_bytes(), FILE)
