"""Fills a reporting guideline from a run: python -m lungjax.checklist RUN --standard=claim|tripod_ai|stard_ai

Prints a Markdown table with each item of the guideline, the answer of the run and its place, and what authors must
state, and writes it to RUN/checklist_STANDARD.md. Only the files of the run are read. The items and the templates of
the answers are in checklist.toml.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from absl import flags

from lungjax import cli
from lungjax.config import AugmentConfig, Config, overrides
from lungjax.report import context, templating
from lungjax.report.templating import count
from lungjax.runtime.files import atomic_write

FLAGS = flags.FLAGS
STANDARDS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
ANSWERS: dict[str, tuple[str, str]] = STANDARDS.pop("answers")  # place and template
AUTHORS = "authors must state"


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("standard", "claim", list(STANDARDS), "Reporting guideline.")


def main(argv: list[str]) -> None:
    """Prints the checklist and writes it into the run."""
    run = Path(argv[1])
    text = checklist(run, FLAGS.standard)
    path = run / f"checklist_{FLAGS.standard}.md"
    atomic_write(path, text)
    print(f"{text}\n{path}")


def checklist(run: Path, standard: str) -> str:
    """Returns the Markdown of a guideline, filled from a finished run. Raises ValueError if there is no report."""
    if not (run / "report.json").is_file() or not (run / "config.json").is_file():
        raise ValueError(f"{run}: no report.json and config.json; name the folder of a finished run")
    config, report = overrides.read(run / "config.json"), json.loads((run / "report.json").read_text("utf-8"))
    tested = {path.parent.name: json.loads(path.read_text("utf-8")) for path in run.glob("external/*/report.json")}
    answers = answer(config, report, {name: tested[name]["test"] for name in sorted(tested)})
    rows, full, partial = [], 0, 0
    for number, section, request, keys, remaining in STANDARDS[standard]["items"]:
        found = [key for key in keys.split() if answers[key]]
        full += bool(found) and not remaining
        partial += bool(found and remaining)
        rest = f"{AUTHORS}: {remaining}" if found and remaining else "" if found else AUTHORS
        texts, places = dict.fromkeys(answers[key] for key in found), dict.fromkeys(ANSWERS[key][0] for key in found)
        rows.append([number, section, request, "; ".join(texts), "; ".join(places), rest])
    head = ["item", "section", "what to report", "this run", "place", "authors"]
    return templating.render(
        "checklist.md.j2",
        standard=STANDARDS[standard],
        run=run,
        name=report["name"],
        full=full,
        partial=partial,
        items=templating.Table(head, rows, text=True),
    )


def answer(config: Config, report: Mapping[str, Any], external: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text of each answer, "" if the run has none; `external` has the scores on other data sets by name."""
    facts, test = report["facts"], report["test"]
    columns = facts.get("characteristics", {}).get("all", {}).get("columns", {})
    unknown = {name: values.get("unknown", 0) + values.get("missing", 0) for name, values in columns.items()}
    patients, level = context.tested_patients(report), test["slice"]
    excluded = count(patients - test["patient"]["n"], "test patient") if patients > test["patient"]["n"] else ""
    values = {
        "config": config,
        "report": report,
        "facts": facts,
        "external": external,
        "augmentation": [f"{k}={v}" for k, v in context.changed(config.augment, AugmentConfig()).items()],
        "controls": context.CONTROLS,
        "metrics": [context.words(report, words) for name, words in context.METRICS.items() if name in level],
        "sources": columns.get("source", {}),
        "subgroups": [f"{name} ({', '.join(groups)})" for name, groups in test["subgroups"].items()],
        "tested": f"{count(level['n'], report['unit'])} of {count(patients, 'patient')} in test",
        "excluded": f"{excluded}, with images of several classes, excluded from scores per patient" if excluded else "",
        "unlabeled": {name: level["n"] - v["known"] for name, v in level["per_class"].items() if "known" in v},
        "unknown": {name: n for name, n in unknown.items() if n},
    }
    environment = jinja2.Environment(undefined=jinja2.ChainableUndefined)
    environment.filters |= {
        "count": count, "counts": _counts, "listed": templating.listed, "number": context.number,
        "plain": templating.plain, "scores": _scores,
    }  # fmt: skip
    texts = {key: environment.from_string(template).render(values) for key, (_, template) in ANSWERS.items()}
    return {key: " ".join(text.split()) for key, text in texts.items()}


def _scores(level: Mapping[str, Any]) -> str:
    report = {"multilabel": "confusion" not in level}
    return ", ".join(
        f"{context.words(report, t)} {context.number(level, name)}" for name, t in context.HEADLINE.items()
    )


def _counts(numbers: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name}: {n:,}" for name, n in (numbers or {}).items())


if __name__ == "__main__":
    cli.run(main, define_flags, ("RUN",))
