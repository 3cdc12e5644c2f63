"""Imports run one way: a package imports only those before it in `PACKAGES`."""

import ast
import subprocess
import sys
from pathlib import Path

import lungjax

PACKAGE = Path(lungjax.__file__).parent
PACKAGES = (
    "config", "runtime", "models", "data", "datasets", "weights", "evaluation", "report", "explain", "training",
    "inference", "export", "serve", "tables",
)  # fmt: skip
# Leaves, like the __main__ of each package.
COMMANDS = {"cli", "main", "prepare", "explore", "predict", "compare", "checklist", "power", "runs", "tensorboard"}


def imported(path: Path) -> set[str]:
    """Returns the packages and top-level modules of lungjax that a file imports anywhere, even in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lungjax":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lungjax.")}
    return found - {"__version__"}


def test_packages():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert found - {"experiments"} == set(PACKAGES)  # an installed package has the experiments as well
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__"}


def test_direction_of_imports():
    wrong = []
    for number, package in enumerate(PACKAGES):
        for path in sorted((PACKAGE / package).rglob("*.py")):
            allowed = {"cli", *PACKAGES} if path.name == "__main__.py" else set(PACKAGES[: number + 1])
            wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in sorted(imported(path) - allowed)]
    for name in COMMANDS:
        wrong += [f"{name} imports {other}" for other in sorted(imported(PACKAGE / f"{name}.py") & COMMANDS - {"cli"})]
    assert not wrong


def test_ignored_source_files():
    """No committed file is ignored by git, since it would be missing from the wheel."""
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert not subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True).stdout


def test_imports_of_experiments():
    for path in (PACKAGE.parent / "experiments").glob("*.py"):
        assert imported(path) == {"config"}, path


def test_imports_of_a_training_step():
    absent = ("grain", "tensorflow_datasets", "orbax", "h5py", "matplotlib", "tensorflow", "torch", "skimage")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "  # None makes an import fail
        "from lungjax import models; from lungjax.evaluation import metrics; from lungjax.runtime import mesh; "
        "from lungjax.training import optim, program, state, step"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_of_benchmark_peers():
    code = "import sys; sys.modules.update(flax=None, jax=None); from tests.benchmarks import latency, train_peers; "
    code += "from tests.parity import cases, references"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
