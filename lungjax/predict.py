"""Predicts images with a trained model: python -m lungjax.predict --model=runs/my_run scan.png more_scans

PATHs are images, folders, CSV lists (column `path`, and `group` for patients), DICOM files and series, and NIfTI
volumes. Written to --out: predictions.csv and predictions.jsonl with one line per image, series.csv and series.jsonl
with one line per series or patient (`lungjax.inference.records` describes them), and with --explain one saliency map
per image. Inputs that fail are listed in the files and at the end, the others are predicted, and the exit code is 1.
Files are renamed when they are complete; an interrupted run leaves its records in files that end in .partial.
"""

import contextlib
import csv
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from lungjax import cli
from lungjax.config import nearest
from lungjax.config.metadata import NOTICE
from lungjax.inference import records
from lungjax.runtime import environment
from lungjax.runtime.advice import in_user_form

FLAGS = flags.FLAGS

FILES = ("predictions.csv", "predictions.jsonl", "series.csv", "series.jsonl")
CHUNK = 64  # images in memory at a time
MAX_LINES = 12  # on the screen


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Folder of a finished run, or a model.pyz or model.onnx of lungjax.export.")
    flags.DEFINE_string("out", "predictions", "Output folder.")
    flags.DEFINE_bool("overwrite", False, "Replace the predictions in --out.")
    flags.DEFINE_string("rule", records.RULE, "Operating point of the decisions: youden, or sensitivity_0.95.")
    flags.DEFINE_bool("explain", False, "Also draw saliency maps.")
    flags.DEFINE_string("method", "gradcam", "Method of --explain; see lungjax.explain.")
    flags.DEFINE_string("gate", None, "Model that first decides which volumes are predicted.")
    flags.DEFINE_string("gate_class", "WholeLung", "Class that --gate must call for a volume to be predicted.")
    flags.DEFINE_string("group_pattern", "", "Regex whose first group, matched in the path, is the patient.")
    cli.define_window_flags()


def main(argv: list[str]) -> None:
    """Checks the flags, predicts, and lists the inputs that failed."""
    if not FLAGS.model:
        raise app.UsageError("--model=RUN is missing: the folder of a finished run, or an exported model")
    out = Path(FLAGS.out).expanduser()
    if not FLAGS.overwrite and any((out / name).exists() for name in FILES):
        raise ValueError(f"{out} has predictions already; choose another --out, or replace them with --overwrite")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    environment.prepare_jax()
    from lungjax.inference import inputs  # here, after the flags, since these import jax
    from lungjax.inference.model import load

    model = load(FLAGS.model)
    if FLAGS.explain:
        model.check_method(FLAGS.method)
    records.check_rule(model.metadata, FLAGS.rule)
    gate = load(FLAGS.gate) if FLAGS.gate else None
    if gate is not None and FLAGS.gate_class not in gate.metadata.classes:
        raise ValueError(f"--gate_class={FLAGS.gate_class}: {nearest(FLAGS.gate_class, gate.metadata.classes)}")
    model = replace(model, metadata=replace(model.metadata, **cli.windows()))
    sources = inputs.gather(argv[1:], model.metadata, FLAGS.group_pattern)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)  # no file of an earlier call next to the new ones
    failures = predict(model, sources, out, gate)
    print(f"Written to {out}. {NOTICE}")
    if failures:
        print(f"{len(failures)} inputs failed:", file=sys.stderr)
        for name, why in failures[:MAX_LINES]:
            print(in_user_form(f"  {name}: {why}"), file=sys.stderr)
        if len(failures) > MAX_LINES:
            print(f"  and {len(failures) - MAX_LINES} more, in {out / 'predictions.csv'}", file=sys.stderr)
        sys.exit(1)


def predict(model: Any, sources: Any, out: Path, gate: Any = None) -> list[tuple[str, str]]:
    """Writes all files into the folder `out`; returns the name of each failed image and series, and the reason.

    `model` and `gate`, which selects the volumes to predict, are `inference.model.Model`, `sources` is
    `inputs.Inputs`.
    """
    metadata = model.metadata
    verdicts = judge_volumes(gate, sources) if gate else {}
    rejected = {series: record["error"] for series, record in verdicts.items() if "error" in record}
    failures = [*sources.failures, *rejected.items()]
    counts: Counter[str] = Counter()
    probabilities: defaultdict[str, list[np.ndarray]] = defaultdict(list)  # by series, as the next two
    warned: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    file_names: set[str] = set()
    columns = records.columns(metadata)
    with tables(out / "predictions", ["file", "series", *columns, "novelty", "warnings", "error"]) as write:
        for name, why in sources.failures:
            write(records.failure(name, why))
        for item, result, p in predictions(model, [i for i in sources.items if i.series not in rejected]):
            if isinstance(result, str):
                failures.append((item.name, result))
                write({**records.failure(item.name, result), "series": item.series})
                unreadable[item.series] += 1
                continue
            record = records.record(metadata, item.name, p, result.novelty, result.warnings, FLAGS.rule)
            write({**record, "series": item.series})
            counts[record["predicted"]] += 1
            if item.series:
                probabilities[item.series].append(p)
                warned[item.series] += bool(result.warnings)
            if FLAGS.explain:
                draw(model, item.short, result.pixels, p, out / "explain", file_names)
            if sum(counts.values()) <= MAX_LINES:
                print(line(item.name, record))
    total = sum(counts.values())
    if total > MAX_LINES:
        print(f"... and {total - MAX_LINES:,} more")
    if counts:
        print(f"{total:,} images: " + ", ".join(f"{name} {n:,}" for name, n in counts.most_common()))
    if sources.skipped:
        print(f"Skipped {sources.skipped} DICOM objects without an image of the patient")
    if sources.series:
        with tables(out / "series", ["series", "files", *columns, "gate", "warnings", "error"]) as write:
            for series in sources.series:
                if series not in probabilities:
                    write({"series": series, "error": "none of its slices could be read"} | verdicts.get(series, {}))
                    continue
                rows, missing = np.stack(probabilities[series]), unreadable[series]
                notes = [*sources.notes.get(series, []), *([f"{missing} slices could not be read"] if missing else [])]
                record = records.summary(metadata, series, rows, warned[series], notes, FLAGS.rule)
                write({**verdicts.get(series, {}), **record})
                print(line(f"{series} ({len(rows)} slices)", record))
    return failures


def predictions(model: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Yields each item with its `Input` and probabilities, or with the reason why it can't be read and None."""
    from lungjax.inference.inputs import reason  # here, since it imports the image decoders

    def read(item: Any) -> Any:
        try:
            return model.prepare(item.read())
        except (ValueError, OSError) as error:
            return reason(error, item.name)
        except Exception as error:  # decoders raise anything, and one file must not stop the others
            return f"can't be read ({type(error).__name__}: {error})"

    with ThreadPoolExecutor(environment.cores()) as pool:
        for at in range(0, len(items), CHUNK):
            chunk = items[at : at + CHUNK]
            results = list(pool.map(read, chunk))
            pixels = [result.pixels for result in results if not isinstance(result, str)]
            rows = iter(model.outputs(np.stack(pixels))["probabilities"] if pixels else ())
            for item, result in zip(chunk, results, strict=True):
                yield item, result, None if isinstance(result, str) else next(rows)


def judge_volumes(gate: Any, sources: Any) -> dict[str, dict[str, Any]]:
    """Returns by series the judgment of the gate: a record with `gate`, and with `error` if it rejects the volume."""
    from lungjax.data.imaging import images  # here, since it imports Pillow, and most calls have no gate

    metadata, name = gate.metadata, FLAGS.gate_class
    verdicts: dict[str, dict[str, Any]] = {}
    for series, middle in sources.series.items():
        if middle is None:
            continue  # images of one patient, not a volume
        try:
            result = gate.prepare(images.read(middle(metadata.plane, metadata.hu_windows))[0])
        except (ValueError, OSError) as error:
            verdicts[series] = {"series": series, "error": f"the gate can't judge it: {error}"}
            continue
        p = gate.outputs(result.pixels[None])["probabilities"][0]
        record = records.record(metadata, series, p)
        point, probability = record["decisions"].get(name), float(p[metadata.classes.index(name)])
        passed = point["called"] if point else record["predicted"] == name
        decision = {"class": name, "probability": round(probability, 6), "passed": passed}
        rejection = {} if passed else {"error": f"rejected by the gate: the probability of {name} is {probability:.3f}"}
        verdicts[series] = {"series": series, "gate": decision, **rejection}
    single = sum(sources.series.get(item.series) is None for item in sources.items)
    if single:
        print(f"--gate: {single} of {len(sources.items)} images do not belong to a volume and are not judged")
    return verdicts


def draw(model: Any, name: str, pixels: np.ndarray, p: np.ndarray, folder: Path, file_names: set[str]) -> None:
    """Draws the saliency map of the predicted class."""
    from lungjax.explain import figures  # here, since most calls draw nothing

    best = int(p.argmax())
    heat = model.maps(pixels[None], np.asarray([best]), FLAGS.method)[0]
    path = folder / f"{figures.file_name(name, file_names)}_{FLAGS.method}.png"
    figures.draw(path, name, pixels, heat, p, model.metadata.classes, best, FLAGS.method)


@contextlib.contextmanager
def tables(stem: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yields a function that writes a record into STEM.csv and STEM.jsonl, which are renamed when complete."""
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".jsonl")]
    partials = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in paths]
    with contextlib.ExitStack() as stack:
        # File names need not be UTF-8: the table keeps their bytes, JSON escapes them.
        table, lines = (
            stack.enter_context(path.open("w", buffering=1, newline="", encoding="utf-8", errors=errors))
            for path, errors in zip(partials, ("surrogateescape", "backslashreplace"), strict=True)
        )
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(columns)

        def write(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            writer.writerow([records.cell(record, column) for column in columns])

        yield write
    for partial, path in zip(partials, paths, strict=True):
        partial.replace(path)


def line(name: str, record: dict[str, Any]) -> str:
    """Returns a record as text for the screen."""
    called = [other for other, point in record["decisions"].items() if point["called"]]
    text = f"{name}: {record['predicted']} {record['probabilities'][record['predicted']]:.3f}"
    text += f", called {' and '.join(called)}" if called else ""
    return text + "".join(f"\n  warning: {warning}" for warning in record["warnings"])


if __name__ == "__main__":
    cli.run(main, define_flags, ("PATH...",))
