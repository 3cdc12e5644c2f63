"""Predicts images with a trained network: python -m lungjax.predict --model=runs/my_run scan.png more_scans

PATHs are images, folders, CSV lists (column `path`, and `group` for patients), DICOM files and series, and NIfTI
volumes. Written to --out: predictions.csv and predictions.jsonl with a line an image, series.csv and series.jsonl with
one for each series or patient (`lungjax.inference.records` says what is in them), and with --explain a picture of each
heat map. What can't be read is named in the files and at the end, the rest is done, and the exit code is 1. The files
appear when all is done; of a run that was stopped, the answers so far stay in files that end in .partial.
"""

import contextlib
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from lungjax import cli
from lungjax.config import nearest
from lungjax.config.metadata import NOTICE, Metadata
from lungjax.inference import records
from lungjax.runtime import environment

FLAGS = flags.FLAGS

WRITTEN = ("predictions.csv", "predictions.jsonl", "series.csv", "series.jsonl")
CHUNK = 64  # images in memory at a time
SHOWN = 12  # lines on the screen


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A finished run's folder, or a model.pyz or model.onnx of lungjax.export.")
    flags.DEFINE_string("out", "predictions", "The folder to write to.")
    flags.DEFINE_bool("overwrite", False, "Replaces predictions that lie in --out.")
    flags.DEFINE_string("rule", records.RULE, "Operating point that decides: youden, or sensitivity_0.95.")
    flags.DEFINE_bool("explain", False, "Draws heat maps too.")
    flags.DEFINE_string("method", "gradcam", "Of the heat maps; see lungjax.explain.")
    flags.DEFINE_string("gate", None, "A model that first says of each series whether it may be predicted.")
    flags.DEFINE_string("gate_class", "WholeLung", "The class of --gate that a series must have.")
    flags.DEFINE_string("group_pattern", "", "Regex; its first group over a path names the patient.")
    flags.DEFINE_string("window", None, "low,high of 16-bit images; default the model's.")
    flags.DEFINE_string("hu_window", None, "centre/width in HU of CT volumes; default the model's.")


def main(argv: list[str]) -> None:
    """Checks what was asked for, predicts, and names what could not be read."""
    if not FLAGS.model:
        raise app.UsageError("--model=RUN is missing: the folder of a finished run, or an exported model")
    out = Path(FLAGS.out).expanduser()
    if not FLAGS.overwrite and any((out / name).exists() for name in WRITTEN):
        raise ValueError(f"{out} holds predictions already; choose another --out, or replace them with --overwrite")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be no text
    environment.prepare_jax()
    from lungjax.inference import inputs, predictor  # here, after the flags, since they import jax

    model = predictor.open_model(FLAGS.model)
    if FLAGS.explain and FLAGS.method not in model.methods:
        known = nearest(FLAGS.method, model.methods) if model.methods else f"a {model.source} model has no heat maps"
        raise ValueError(f"--method={FLAGS.method}: {known}")
    records.check_rule(model.metadata, FLAGS.rule)
    gate = predictor.open_model(FLAGS.gate) if FLAGS.gate else None
    if gate is not None and FLAGS.gate_class not in gate.metadata.classes:
        raise ValueError(f"--gate_class={FLAGS.gate_class}: {nearest(FLAGS.gate_class, gate.metadata.classes)}")
    model = replace(model, metadata=windowed(model.metadata))
    found = inputs.gather(argv[1:], model.metadata, FLAGS.group_pattern)
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)  # that nothing of another run lies beside this one's
    failures = predict(model, found, out, gate)
    print(f"Written to {out}. {NOTICE}")
    if failures:
        print(f"{len(failures)} could not be predicted:", file=sys.stderr)
        for name, why in failures[:SHOWN]:
            print(f"  {name}: {why}", file=sys.stderr)
        if len(failures) > SHOWN:
            print(f"  and {len(failures) - SHOWN} more, in {out / 'predictions.csv'}", file=sys.stderr)
        sys.exit(1)


def windowed(told: Metadata) -> Metadata:
    """Returns what the model says of itself with the windows that the user gave instead."""
    if FLAGS.window:
        told = replace(told, window=cli.read_window(FLAGS.window))
    return replace(told, hu_windows=(cli.read_hu_window(FLAGS.hu_window),)) if FLAGS.hu_window else told


def predict(model: Any, found: Any, out: Path, gate: Any = None) -> list[tuple[str, str]]:
    """Writes all files into `out`; returns the name of each image and series that got no answer, and why.

    Args:
      model: `predictor.Predictor`.
      found: `inputs.Intake`.
      out: a folder that is there.
      gate: another predictor, which decides which series are predicted.
    """
    told = model.metadata
    failures: list[tuple[str, str]] = list(found.bad)
    shut, judged = _gate(gate, found) if gate else ({}, {})
    failures += [(name, record["error"]) for name, record in shut.items()]
    counts: Counter[str] = Counter()
    chances: dict[str, list[np.ndarray]] = {}
    warned: Counter[str] = Counter()
    missed: Counter[str] = Counter()  # slices of a series that can't be read
    used: set[str] = set()
    classes = told.classes
    columns = ["file", "series", "predicted", *(f"p_{name}" for name in classes)]
    columns += [*(f"called_{name}" for name in classes), "unlike", "warnings", "error"]
    with _both(out / "predictions", columns) as write:
        for name, why in found.bad:
            write(records.failure(name, why))
        for item, picture, p in _answered(model, [i for i in found.items if i.series not in shut]):
            if isinstance(picture, str):
                failures.append((item.name, picture))
                write({**records.failure(item.name, picture), "series": item.series})
                missed[item.series] += 1
                continue
            record = records.record(told, item.name, p, picture.unlike, picture.warnings, FLAGS.rule)
            write({**record, "series": item.series})
            counts[record["predicted"]] += 1
            if item.series:
                chances.setdefault(item.series, []).append(p)
                warned[item.series] += bool(picture.warnings)
            if FLAGS.explain:
                _draw(model, item.short, picture, out / "explain", used)
            if sum(counts.values()) <= SHOWN:
                print(_line(item.name, record))
    total = sum(counts.values())
    if total > SHOWN:
        print(f"... and {total - SHOWN:,} more")
    if counts:
        print(f"{total:,} images: " + ", ".join(f"{name} {n:,}" for name, n in counts.most_common()))
    if found.beside:
        print(f"{found.beside} DICOM files show nothing of the patient and were left out")
    if found.middle:
        with _both(out / "series", ["series", "files", *columns[2:-3], "gate", "warnings", "error"]) as write:
            for series in found.middle:
                if series in shut:
                    write(shut[series])
                elif series in chances:
                    rows = np.stack(chances[series])
                    lost = [f"{missed[series]} slices could not be read"] if missed[series] else []
                    notes = [*found.notes.get(series, []), *lost]
                    record = records.summary(told, series, rows, warned[series], notes, FLAGS.rule)
                    write(record | ({"gate": judged[series]} if series in judged else {}))
                    print(_line(f"{series} ({len(rows)} slices)", record))
                else:
                    write({"series": series, "error": "none of its slices could be read"})
    return failures


def _answered(model: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Yields each item with its picture and probabilities, or why it can't be read, a text, and None."""
    from lungjax.inference.inputs import plain  # here, since it imports what reads images

    def read(item: Any) -> Any:
        try:
            return model.picture(item.read())
        except (ValueError, OSError) as error:
            return plain(error, item.name)
        except Exception as error:  # decoders raise what they like, and one file must not cost the others their answer
            return f"can't be read ({type(error).__name__}: {error})"

    with ThreadPoolExecutor(environment.cores()) as pool:
        for at in range(0, len(items), CHUNK):
            part = items[at : at + CHUNK]
            pictures = list(pool.map(read, part))
            good = [picture.pixels for picture in pictures if not isinstance(picture, str)]
            answered = iter(model(np.stack(good)) if good else ())
            for item, picture in zip(part, pictures, strict=True):
                yield item, picture, None if isinstance(picture, str) else next(answered)


def _gate(gate: Any, found: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns the series that the gate shuts out, with their records, and what it says of all that it has seen."""
    from lungjax.data.imaging import images  # here, since it imports Pillow, and most runs have no gate

    told = gate.metadata
    shut: dict[str, dict[str, Any]] = {}
    judged: dict[str, Any] = {}
    number = told.classes.index(FLAGS.gate_class)
    for series, middle in found.middle.items():
        if middle is None:
            continue  # pictures of one patient, and no volume: there is nothing to cut
        try:
            picture = gate.picture(images.read(middle(told.plane, told.hu_windows))[0])
        except (ValueError, OSError) as error:
            shut[series] = {"series": series, "error": f"the gate can't judge it: {error}"}
            continue
        p = gate(picture.pixels[None])[0]
        said = records.record(told, series, p, picture.unlike, picture.warnings)
        point = said["decisions"].get(FLAGS.gate_class)
        passed = point["called"] if point else said["predicted"] == FLAGS.gate_class
        judged[series] = {"class": FLAGS.gate_class, "probability": round(float(p[number]), 6), "passed": passed}
        if not passed:
            why = f"left out by the gate: {FLAGS.gate_class} has a probability of {p[number]:.3f}"
            shut[series] = {"series": series, "error": why, "gate": judged[series]}
    loose = sum(found.middle.get(item.series) is None for item in found.items)
    if loose:
        print(f"--gate: {loose} of {len(found.items)} images are of no volume, so the gate can't judge them")
    return shut, judged


def _draw(model: Any, name: str, picture: Any, folder: Path, used: set[str]) -> None:
    from lungjax.explain import panels  # here, since most runs draw nothing

    maps, p = model.explain(picture.pixels[None], method=FLAGS.method)
    path = folder / f"{panels.file_name(name, used)}_{FLAGS.method}.png"
    best = int(p[0].argmax())
    panels.draw(path, name, picture.pixels, maps[0], p[0], model.metadata.classes, best, FLAGS.method)


@contextlib.contextmanager
def _both(stem: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yields what writes a record into STEM.csv and STEM.jsonl, which bear these names once they are whole."""
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".jsonl")]
    partials = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in paths]
    with contextlib.ExitStack() as stack:
        # Names of files may be no UTF-8: in the table they stay the bytes that they are, in JSON they are escaped.
        table, lines = (
            stack.enter_context(path.open("w", buffering=1, newline="", encoding="utf-8", errors=errors))
            for path, errors in zip(partials, ("surrogateescape", "backslashreplace"), strict=True)
        )
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(columns)

        def write(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            writer.writerow([_cell(record, column) for column in columns])

        yield write
    for partial, path in zip(partials, paths, strict=True):
        partial.replace(path)


def _cell(record: dict[str, Any], column: str) -> Any:
    kind, _, name = column.partition("_")
    if kind == "p":
        return record.get("probabilities", {}).get(name, "")
    if kind == "called":
        point = record.get("decisions", {}).get(name)
        return "" if point is None else "yes" if point["called"] else "no"
    value = record.get(column, "")
    if column == "warnings":
        return "; ".join(value or ())
    if column == "gate" and value:
        return "passed" if value["passed"] else "held back"
    return "" if value is None else value


def _line(name: str, record: dict[str, Any]) -> str:
    told = record["probabilities"]
    called = [other for other, point in record["decisions"].items() if point["called"]]
    said = f"{name}: {record['predicted']} {told[record['predicted']]:.3f}"
    said += f", called {' and '.join(called)}" if called else ""
    return said + "".join(f"\n  warning: {line}" for line in record["warnings"])


if __name__ == "__main__":
    cli.run(main, define_flags, ("PATH...",))
