"""Imports run one way: a file may import only from rows above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import lungjax

PACKAGE = Path(lungjax.__file__).parent

# The first matching prefix counts. Files of one row don't import each other, but for a folder's own files.
ROWS = [
    ["config", "predictions", "trees", "interrupt", "html", "study_metrics"],
    [
        "presets",
        "losses",
        "metrics",
        "logs",
        "sharding",
        "state",
        "figures",
        "machine",
        "hosts",
        "provenance",
        "hlo",
        "metadata",
    ],
    [
        "bootstrap",
        "calibration",
        "overrides",
        "models",
        "data",
        "augment",
        "optim",
        "checkpoint",
        "entry",
        "report_page",
        "answers",
    ],
    [
        "decisions",
        "plots",
        "report_card",
        "experiment",
        "datasets",
        "weights",
        "step",
        "inference",
        "familiarity",
        "artefacts",
    ],
    [
        "plots_decisions",
        "report_html",
        "controls",
        "evaluate",
        "workdir",
        "program",
        "progress",
        "saliency",
        "deployment",
        "intake",
    ],
    ["report", "saliency_quality", "panels"],
    ["train", "api", "pod"],
    ["crossval", "external", "tables", "predictor"],
    ["main", "prepare", "explore", "compare", "explain", "predict", "export", "serve"],
]


def row(name: str) -> int:
    return next(i for i, names in enumerate(ROWS) if name in names)


def imported(path: Path) -> set[str]:
    """The top-level lungjax modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lungjax":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lungjax.")}
    return found - {"__version__"}


def test_imports_run_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if top in ("__init__", "experiments"):
            continue
        for name in imported(path) - {top}:
            if row(name) >= row(top):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_experiments_import_configuration_and_presets_alone():
    for path in (PACKAGE.parent / "experiments").glob("*.py"):
        assert imported(path) <= {"config", "presets"}, path
        assert len(path.read_text().splitlines()) <= 100, path


def test_models_step_and_metrics_need_no_data_or_plotting_packages():
    absent = ("grain", "tensorflow_datasets", "orbax", "orbax.checkpoint", "matplotlib", "tensorflow", "torch")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "  # None there makes an import fail
        "from lungjax import models; from lungjax.training import step, losses, optim, state; from lungjax.evaluation import metrics; from lungjax.runtime import mesh"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_outgrows_its_room():
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(PACKAGE)}: {lines} lines"
        assert path.stem not in ("utils", "common", "helpers", "base", "misc")
