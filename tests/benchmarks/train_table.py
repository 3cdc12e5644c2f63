"""Markdown tables from the files that `train.py` leaves; what has no file is "not measured"."""

import json
import statistics
from pathlib import Path
from typing import Any

PEAK = {"bfloat16": 989e12}  # operations a second: dense bfloat16 of an H200, as its maker gives it
WANTED = {
    "cpu": "wanted beside Keras: 4 for the first two, 3 for efficientnetv2_s, 2.5 for convnext_tiny, 1.1 for "
    "resnet50v2 and densenet121, 1 for cbr_larget; beside torch: 0.45, hoped for: 1",
    "gpu": "wanted: at least the speed of both, augmentation below 3 % of the step",
}
Cell = dict[str, Any]


def tables(cells: list[Cell], folder: Path) -> str:
    """Returns the tables of both lists as markdown.

    Args:
      cells: dicts with platform, network, size, batch, dtype, contender and key, in the order of the rows.
      folder: holds KEY.json for each that was run.
    """
    found = {cell["key"]: _read(folder / f"{cell['key']}.json") for cell in cells}
    parts = []
    for platform in ("cpu", "gpu"):
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in cells:
            if cell["platform"] == platform:
                groups.setdefault((cell["network"], cell["size"], cell["batch"]), []).append(cell)
        rows = [({_role(cell): found[cell["key"]] for cell in members}, name) for name, members in groups.items()]
        parts.append(_speed(platform, rows))
        if platform == "gpu":
            parts.append(_arithmetic(rows))
        parts.append(_costs(rows))
    versions = sorted({facts["versions"] for facts in found.values() if facts and "versions" in facts})
    return "\n\n".join([*parts, "Versions: " + ("; ".join(versions) or "not measured") + "."])


def _read(path: Path) -> Cell | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _role(cell: Cell) -> str:
    """What a cell is in its group: "ours" in another type than the list's is a role of its own."""
    usual = {"cpu": "float32", "gpu": "bfloat16"}[cell["platform"]]
    return cell["contender"] if cell["dtype"] == usual else f"{cell['contender']} {cell['dtype']}"


def _missing(facts: Cell | None) -> str:
    if facts is None:
        return "not measured"
    return f"failed: {facts['error'][:60]}" if "error" in facts else ""


def _median(facts: Cell | None, scale: float = 1e3) -> str:
    return _missing(facts) or f"{scale * statistics.median(facts['seconds']):.1f}"


def _ratio(facts: Cell | None) -> str:
    """How many times as fast as this contender ours is: within each round, then the median, lowest and highest."""
    if text := _missing(facts):
        return text
    if "ours_seconds" not in facts:
        return "ours failed"
    ratios = [peer / ours for peer, ours in zip(facts["seconds"], facts["ours_seconds"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def _title(name: tuple[Any, ...]) -> str:
    network, size, batch = name
    return f"{network}, {batch} x {size} px"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(heads) - 1)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def _speed(platform: str, rows: list[tuple[dict[str, Cell | None], tuple[Any, ...]]]) -> str:
    dtype = {"cpu": "float32", "gpu": "bfloat16"}[platform]
    heads = [f"{platform}, {dtype}", "ours, ms", "Keras, ms", "torch, ms", "speed / Keras", "speed / torch"]
    if platform == "gpu":
        heads += ["speed / ours float32", "augmentation, share of the step"]
    heads.append("others")
    lines = []
    for roles, name in rows:
        line = [_title(name), *(_median(roles.get(role)) for role in ("ours", "keras", "torch"))]
        line += [_ratio(roles.get("keras")), _ratio(roles.get("torch"))]
        if platform == "gpu":
            extras = {"ours float32": _ratio, "augmented": _share}
            line += [shown(roles[role]) if role in roles else "-" for role, shown in extras.items()]
        shares = [max(facts["others"]) for facts in roles.values() if facts and facts.get("others")]
        lines.append([*line, f"{max(shares):.0%}" if shares else ""])
    return f"{_table(heads, lines)}\n\n({WANTED[platform]}.)"


def _share(facts: Cell | None) -> str:
    """What part of the augmented step the augmentation is."""
    if text := _missing(facts) or ("" if "ours_seconds" in facts else "ours failed"):
        return text
    shares = [1 - ours / whole for whole, ours in zip(facts["seconds"], facts["ours_seconds"], strict=True)]
    return f"{statistics.median(shares):.1%} ({min(shares):.1%}..{max(shares):.1%})"


def _arithmetic(rows: list[tuple[dict[str, Cell | None], tuple[Any, ...]]]) -> str:
    """How much of the device's arithmetic our step uses, by XLA's count of its operations."""
    heads = ["ours, bfloat16", "GFLOP a step, compiled", "as traced", "of 989 TFLOP/s", "of a matrix product's rate"]
    lines = []
    for roles, name in rows:
        facts = roles.get("ours")
        if text := _missing(facts):
            lines.append([_title(name), *[text] * 4])
            continue
        counts = [facts.get(key) for key in ("flops_compiled", "flops_traced")]
        done = next((count for count in counts if count), None)
        line = [_title(name), *("not counted" if count is None else f"{count / 1e9:.1f}" for count in counts)]
        for peak in (PEAK["bfloat16"], facts.get("matmul_flops")):
            rate = done / statistics.median(facts["seconds"]) if done else None
            line.append(f"{rate / peak:.1%}" if rate and peak else "not counted")
        lines.append(line)
    return _table(heads, lines)


def _costs(rows: list[tuple[dict[str, Cell | None], tuple[Any, ...]]]) -> str:
    """Seconds to compile and peaks of memory."""
    names = ("ours", "keras", "torch")
    heads = ["ours / Keras / torch", "seconds to compile", "peak memory, GiB", "parameters, millions"]
    keys = {"compile_seconds": (1.0, ".1f"), "peak_bytes": (2.0**30, ".2f"), "parameters": (1e6, ".2f")}
    lines = []
    for roles, name in rows:
        line = [_title(name)]
        for key, (unit, form) in keys.items():
            values = [(roles.get(role) or {}).get(key) for role in names]
            line.append(" / ".join("-" if value is None else f"{value / unit:{form}}" for value in values))
        lines.append(line)
    return _table(heads, lines)
