"""Predicts images with a trained model: python -m lungjax.predict --model=runs/my_run scan.png more_scans

Several models, as in --model=runs/a,runs/b, are an ensemble, which averages their calibrated probabilities.
PATHs are images, folders, CSV lists (columns `path` and, for patients, `group`), DICOM files and series, or NIfTI
volumes. The folder --out receives predictions.csv and predictions.jsonl with one line per image, series.csv and
series.jsonl with one line per series or patient (see `lungjax.inference.records`) and, with --explain, one saliency map
per image. Inputs that fail are listed in the files and at the end, the others are predicted, and the exit code is 1. An
interrupted command leaves files that end in .partial; rerun it to resume.
"""

import contextlib
import csv
import hashlib
import itertools
import json
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
from lungjax.data.safe_text import csv_row, printable
from lungjax.inference import records
from lungjax.runtime import environment, files
from lungjax.runtime.advice import in_user_form

FLAGS = flags.FLAGS

# Flags that affect the records, as do metadata and inputs.
KEY_FLAGS = ("rule", "explain", "method", "gate_class", "max_megapixels", "max_megavoxels")
FILES = ("predictions.csv", "predictions.jsonl", "series.csv", "series.jsonl")
CHUNK = 64  # images in memory at a time
MAX_LINES = 12  # printed per list
MAX_SHOWN = 3  # findings of an image without, or with several, predicted ones


def define_flags() -> None:
    """Defines the flags of this command."""
    kinds = "Folder of a finished run, or a model.pyz or model.onnx of lungjax.export"
    flags.DEFINE_list("model", [], cli.MODEL_HELP.format(kinds))
    flags.DEFINE_string("out", "predictions", "Output folder.")
    flags.DEFINE_bool("overwrite", False, "Replace the predictions in --out.")
    flags.DEFINE_string("rule", records.RULE, "Operating point of the decisions, such as youden or sensitivity_0.95.")
    flags.DEFINE_bool("explain", False, "Also draw a saliency map of each image.")
    flags.DEFINE_string("method", None, "Method of --explain; default gradcam if possible; see lungjax.explain.")
    flags.DEFINE_string("gate", None, "Model that selects the volumes to predict.")
    flags.DEFINE_string("gate_class", "WholeLung", "Class that --gate must assign to a volume for it to be predicted.")
    flags.DEFINE_string("group_pattern", "", "Regex whose first group is the patient in a path below a folder.")
    cli.define_window_flags()
    cli.define_limit_flags()


def main(argv: list[str]) -> None:
    """Checks the flags, predicts, and lists the inputs that failed."""
    if not FLAGS.model:
        raise app.UsageError("--model=RUN is missing: the folder of a finished run, or an exported model")
    out = Path(FLAGS.out).expanduser()
    check_out(out)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    environment.prepare_jax()
    from lungjax.inference import inputs  # here, after the flags, since these import jax
    from lungjax.inference.model import load

    model = load(FLAGS.model)
    if model.metadata.members:
        print(f"{model.metadata.name}. {model.metadata.about['warnings'][0]}")  # where its operating points come from
    if FLAGS.explain:
        print(f"Saliency maps by {model.check_method(FLAGS.method)}")
    records.check_rule(model.metadata, FLAGS.rule)
    gate = load(FLAGS.gate) if FLAGS.gate else None
    if gate is not None and FLAGS.gate_class not in gate.metadata.classes:
        raise ValueError(f"--gate_class={FLAGS.gate_class}: {nearest(FLAGS.gate_class, gate.metadata.classes)}")
    model = replace(model, metadata=model.metadata.override(**cli.windows()))
    sources = inputs.gather(argv[1:], model.metadata, FLAGS.group_pattern, cli.limits())
    out.mkdir(parents=True, exist_ok=True)
    with files.name_disk_errors(out), (out / "lock").open("a") as file:
        files.lock(file, f"{out}: another process is writing predictions here; wait, or choose another --out")
        check_out(out)  # again, since another process may have finished before the lock
        for name in FILES:
            (out / name).unlink(missing_ok=True)  # so that no file of an earlier call remains next to the new ones
        failures = predict(model, sources, out, gate, run_key(model, sources, gate))
    print(f"Written to {out}. {NOTICE}")
    if failures:
        print(f"{len(failures)} inputs failed:", file=sys.stderr)
        for name, why in failures[:MAX_LINES]:
            print(in_user_form(printable(f"  {name}: {why}")), file=sys.stderr)
        if len(failures) > MAX_LINES:
            print(f"  and {len(failures) - MAX_LINES} more, in {out / 'predictions.csv'}", file=sys.stderr)
        sys.exit(1)


def check_out(out: Path) -> None:
    """Raises ValueError if the folder has predictions, unless --overwrite is given."""
    if not FLAGS.overwrite and any((out / name).exists() for name in FILES):
        raise ValueError(f"{out} has predictions already; choose another --out, or replace them with --overwrite")


def run_key(model: Any, sources: Any, gate: Any) -> str:
    """Returns a digest of code, model, flags and inputs; a call can resume an interrupted one with the same key."""
    from lungjax.runtime import provenance  # here, since it imports jax

    described = [each.metadata.to_json() for each in (model, gate) if each]
    inputs = [[(item.name, item.series) for item in sources.items], sources.failures, sources.stamps]
    text = repr([provenance.code(), described, [FLAGS[name].value for name in KEY_FLAGS], inputs])
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=6).hexdigest()


def predict(model: Any, sources: Any, out: Path, gate: Any, key: str) -> list[tuple[str, str]]:
    """Writes all files into the folder `out`; returns the failed images and series as (name, reason).

    `model` and `gate`, which selects the volumes to predict, are of type `inference.model.Model`; `sources` is an
    `inputs.Inputs`, and `key` is the result of `run_key`.
    """
    metadata = model.metadata
    verdicts = judge_volumes(gate, sources) if gate else {}
    rejected = {series: record["error"] for series, record in verdicts.items() if "error" in record}
    failures = [*sources.failures, *rejected.items()]
    counts: Counter[str] = Counter()
    probabilities: defaultdict[str, list[np.ndarray]] = defaultdict(list)  # by series, as the next two
    warned: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    items = [item for item in sources.items if item.series not in rejected]
    columns = ["file", "series", *records.columns(metadata), "novelty", "warnings", "error"]
    with tables(out / "predictions", columns, key) as (write, done):
        for name, why in sources.failures[len(done) :]:
            write(records.failure(name, why))
        done = done[len(sources.failures) :]
        if done:
            print(f"Resumed after {len(done):,} of {len(items):,} images")
        for record in itertools.chain(done, image_records(model, items, len(done), out / "explain", write)):
            name, series = record["file"], record["series"]
            if "error" in record:
                failures.append((name, record["error"]))
                unreadable[series] += 1
                continue
            counts[record["predicted"]] += 1
            if series:
                probabilities[series].append(np.asarray(list(record["probabilities"].values()), np.float32))
                warned[series] += bool(record["warnings"])
            if sum(counts.values()) <= MAX_LINES:
                print(line(name, record))
        total = sum(counts.values())
        if total > MAX_LINES:
            print(f"... and {total - MAX_LINES:,} more")
        if counts:
            print(
                f"{total:,} images: "
                + ", ".join(f"{printable(name)} {n:,}" for name, n in counts.most_common(MAX_LINES))
            )
        if sources.documents:
            print(f"Skipped {sources.documents:,} files that are not images")
        if sources.skipped:
            print(f"Skipped {sources.skipped} DICOM objects without an image of the patient")
        if sources.series:
            columns = ["series", "files", *records.columns(metadata), "gate", "warnings", "error"]
            with tables(out / "series", columns, key) as (write, done):
                for series in list(sources.series)[len(done) :]:
                    verdict = verdicts.get(series, {})
                    if series not in probabilities:
                        write({"series": series, "error": "none of its images could be read"} | verdict)
                        continue
                    rows, missing = np.stack(probabilities[series]), unreadable[series]
                    notes = list(sources.notes.get(series, []))
                    if missing:
                        notes.append(f"{missing} images could not be read")
                    record = records.summary(metadata, series, rows, warned[series], notes, FLAGS.rule)
                    write(verdict | record)
                    print(line(f"{series} ({len(rows)} images)", record))
    return failures


def image_records(model: Any, items: Sequence[Any], start: int, folder: Path, write: Any) -> Iterator[dict[str, Any]]:
    """Writes and yields the record of each item from `start` on; with --explain, also draws its map into `folder`."""
    from lungjax.inference import artifacts  # here, since these import jax and the image decoders
    from lungjax.inference.inputs import reason

    if FLAGS.explain:
        from lungjax.explain import figures  # here, since most calls draw nothing

        method = model.check_method(FLAGS.method)
        taken: set[str] = set()
        names = [figures.file_name(item.short, taken) for item in items]

    def read(item: Any) -> Any:
        try:
            return model.prepare(item.read(), modality=item.modality)
        except (ValueError, OSError) as error:
            return reason(error, item.name)
        except Exception as error:  # decoders may raise any exception, and one file must not stop the others
            return f"can't be read ({type(error).__name__}: {error})"

    with ThreadPoolExecutor(environment.cores()) as pool:
        for at in range(start - start % CHUNK, len(items), CHUNK):  # in equal batches, since results depend on them
            chunk = items[at : at + CHUNK]
            results = list(pool.map(read, chunk))
            pixels = [result.pixels for result in results if not isinstance(result, str)]
            rows = iter(model.outputs(np.stack(pixels))["probabilities"] if pixels else ())
            for number, (item, result) in enumerate(zip(chunk, results, strict=True), at):
                p = None if isinstance(result, str) else next(rows)
                if number < start:
                    continue
                if p is None:
                    record: dict[str, Any] = records.failure(item.name, result)
                else:
                    record = records.record(model.metadata, item.name, p, result.novelty, result.warnings, FLAGS.rule)
                    if FLAGS.explain:
                        targets = [int(p.argmax())]
                        if model.metadata.multilabel:  # the called findings, or the most probable one
                            called = [
                                i
                                for i, name in enumerate(model.metadata.classes)
                                if record["decisions"].get(name, {}).get("called")
                            ]
                            targets = called or targets
                        try:
                            for target in targets:
                                heat = model.maps(result.pixels[None], np.asarray([target]), method)[0]
                                shown = artifacts.picture(model.metadata, result.pixels)
                                stem = folder / names[number]
                                figures.draw(stem, item.short, shown, heat, p, model.metadata, target, method)
                        except OSError as error:
                            record["warnings"] = [*record["warnings"], f"no saliency map: {error.strerror or error}"]
                record["series"] = item.series
                write(record)
                yield record


def judge_volumes(gate: Any, sources: Any) -> dict[str, dict[str, Any]]:
    """Returns the gate's record of each volume by series, with `gate` and, if the volume is rejected, `error`."""
    from lungjax.data.imaging import images  # here, since it imports Pillow and most calls have no gate

    metadata, name = gate.metadata, FLAGS.gate_class
    verdicts: dict[str, dict[str, Any]] = {}
    for series, middle in sources.series.items():
        if middle is None:
            continue  # images of one patient, not a volume
        try:
            result = gate.prepare(images.decode(middle(metadata.plane, metadata.hu_windows), None))
        except (ValueError, OSError) as error:
            verdicts[series] = {"series": series, "error": f"the gate can't read it: {error}"}
            continue
        p = gate.outputs(result.pixels[None])["probabilities"][0]
        record = records.record(metadata, series, p)
        point, probability = record["decisions"].get(name), record["probabilities"][name]
        passed = point["called"] if point else record["predicted"] == name
        warnings = [f"gate: {text}" for text in metadata.modality_warnings("CT")]
        sources.notes.setdefault(series, []).extend(warnings)
        decision = {"class": name, "probability": probability, "passed": passed}
        rejection = {} if passed else {"error": f"rejected by the gate: the probability of {name} is {probability:.3f}"}
        verdicts[series] = {"series": series, "gate": decision, **rejection}
    single = sum(sources.series.get(item.series) is None for item in sources.items)
    if single:
        print(f"--gate: {single} of {len(sources.items)} images do not belong to a volume and are not gated")
    return verdicts


@contextlib.contextmanager
def tables(stem: Path, columns: Sequence[str], key: str) -> Iterator[Any]:
    """Yields a function that writes a record to STEM.csv and STEM.jsonl, and the records of an interrupted call.

    The files are renamed when complete.
    """
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".jsonl")]
    partials = [path.with_name(f"{path.name}.{key}.partial") for path in paths]
    with contextlib.ExitStack() as stack:
        lines, table = (  # file names that are not UTF-8 keep their bytes in the table and are escaped in JSON
            stack.enter_context(path.open("a+", buffering=1, newline="", encoding="utf-8", errors="surrogateescape"))
            for path in partials[::-1]
        )
        complete = partials[1].read_bytes().rpartition(b"\n")[0] + b"\n"
        lines.truncate(len(complete) if len(complete) > 1 else 0)
        table.truncate(0)
        done = [json.loads(text) for text in complete.splitlines() if text]
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(csv_row(columns))

        def write_row(record: dict[str, Any]) -> None:
            writer.writerow(csv_row(records.cell(record, column) for column in columns))

        for record in done:
            write_row(record)

        def write(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record, allow_nan=False) + "\n")  # ASCII, without control characters
            write_row(record)

        yield write, done
    for partial, path in zip(partials, paths, strict=True):
        partial.replace(path)


def line(name: str, record: dict[str, Any]) -> str:
    """Formats a record for the screen."""
    called = [other for other, point in record["decisions"].items() if point["called"]]
    p, predicted = record["probabilities"], record["predicted"]
    shown = [predicted] if predicted in p else sorted(p, key=lambda other: -p[other])[:MAX_SHOWN]
    text = f"{name}: " + ", ".join(f"{other} {p[other]:.3f}" for other in shown)
    text += f", called {' and '.join(called)}" if called else ""
    return "\n  warning: ".join(map(printable, (text, *record["warnings"])))


if __name__ == "__main__":
    cli.run(main, define_flags, ("PATH...",), resumable=True)
