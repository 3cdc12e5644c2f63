"""Markdown tables of the results of `train.py`; cells without a file are "not measured"."""

import json
import statistics
from pathlib import Path
from typing import Any

PEAK_FLOPS = 989e12  # per second: dense bfloat16 of an H200, from its data sheet
CONTENDERS = ("ours", "keras", "torch")
Cell = dict[str, Any]
Rows = dict[str, dict[str, Cell | None]]  # by title, then by framework


def tables(cells: list[Cell], folder: Path) -> str:
    """Returns the tables of both platforms as markdown.

    Args:
      cells: dicts with platform, network, size, batch, dtype, contender and key, in the order of the rows.
      folder: contains KEY.json of each cell with a result.
    """
    files = {cell["key"]: folder / f"{cell['key']}.json" for cell in cells}
    results = {key: json.loads(path.read_text()) if path.is_file() else None for key, path in files.items()}
    parts = []
    for platform in ("cpu", "gpu"):
        rows: Rows = {}
        for cell in cells:
            if cell["platform"] == platform:
                title = f"{cell['network']}, {cell['batch']} x {cell['size']} px"
                rows.setdefault(title, {})[cell["contender"]] = results[cell["key"]]
        parts.append(_speed(platform, rows))
        if platform == "gpu":
            parts.append(_arithmetic(rows))
        parts.append(_costs(rows))
    versions = sorted({facts["versions"] for facts in results.values() if facts and "versions" in facts})
    return "\n\n".join([*parts, "Versions: " + ("; ".join(versions) or "not measured") + "."])


def _missing(facts: Cell | None) -> str:
    if facts is None:
        return "not measured"
    return f"failed: {facts['error'][:60]}" if "error" in facts else ""


def _median(facts: Cell | None) -> str:
    return _missing(facts) or f"{1e3 * statistics.median(facts['seconds']):.1f}"


def _ratio(facts: Cell | None) -> str:
    """Returns the speed of ours relative to this framework: median, lowest and highest over the rounds."""
    if text := _missing(facts):
        return text
    if "ours_seconds" not in facts:
        return "ours failed"
    ratios = [peer / ours for peer, ours in zip(facts["seconds"], facts["ours_seconds"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(heads) - 1)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def _speed(platform: str, rows: Rows) -> str:
    dtype = {"cpu": "float32", "gpu": "bfloat16"}[platform]
    heads = [f"{platform}, {dtype}", "ours, ms", "Keras, ms", "torch, ms", "speed / Keras", "speed / torch", "others"]
    lines = []
    for title, cells in rows.items():
        line = [title, *(_median(cells.get(name)) for name in CONTENDERS)]
        line += [_ratio(cells.get(name)) for name in CONTENDERS[1:]]
        shares = [max(facts["others"]) for facts in cells.values() if facts and facts.get("others")]
        lines.append([*line, f"{max(shares):.0%}" if shares else ""])
    return _table(heads, lines)


def _arithmetic(rows: Rows) -> str:
    """Returns the share of the device's arithmetic that our step uses, by XLA's count of its operations."""
    lines = []
    for title, cells in rows.items():
        facts = cells.get("ours")
        line = [_missing(facts)] * 2
        if not line[0]:
            flops = facts.get("flops")
            rate = f"{flops / statistics.median(facts['seconds']) / PEAK_FLOPS:.1%}" if flops else "not counted"
            line = [f"{flops / 1e9:.1f}" if flops else "not counted", rate]
        lines.append([title, *line])
    return _table(["ours, bfloat16", "GFLOP per step", "of 989 TFLOP/s"], lines)


def _costs(rows: Rows) -> str:
    """Returns the table of compile time, peak memory and parameters."""
    heads = ["ours / Keras / torch", "seconds to compile", "peak memory, GiB", "parameters, millions"]
    keys = {"compile_seconds": (1.0, ".1f"), "peak_bytes": (2.0**30, ".2f"), "parameters": (1e6, ".2f")}
    lines = []
    for title, cells in rows.items():
        line = [title]
        for key, (unit, form) in keys.items():
            values = [(cells.get(name) or {}).get(key) for name in CONTENDERS]
            line.append(" / ".join("-" if value is None else f"{value / unit:{form}}" for value in values))
        lines.append(line)
    return _table(heads, lines)
