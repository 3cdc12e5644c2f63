"""Compares networks with their references: python -m tests.parity [--models=REGEX] [--again] [--goldens]

Needs the extra `parity` (and for most networks torch). Every comparison is two processes, the reference's and
ours, so that the largest networks fit into memory one after the other. Each result is appended to results.jsonl, from
which the table of README.md is written; comparisons with a result are skipped.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lungjax
from lungjax import models
from lungjax.config import ModelConfig
from lungjax.models import trees
from lungjax.models.ops import conv
from lungjax.weights import catalogue
from lungjax.weights.convert import SAME_NAMES, convert
from lungjax.weights.name_rules import layouts
from lungjax.weights.readers import open_tensors
from tests.parity.cases import CASES, GOLDEN, LAYOUTS, NAMED, Case

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.jsonl", HERE / "README.md"
GOLDENS = HERE.parent / "goldens"
LIMIT = 1e-4
LIMIT_DOUBLE = 1e-9
LIMIT_TRAINING = 1e-6  # float64, but Keras and torch have some constants of float32
SIZES = ["default_size", "odd_size", "float64"]
HEADER = ["variant", "reference", "parameters", "theirs", *SIZES, "training", "control", "seconds"]


def rng_images(side: int, count: int = 2) -> np.ndarray:
    """Normalised images [count, side, side, 3]."""
    return np.random.default_rng(side).normal(size=(count, side, side, 3)).astype(np.float32)


def sizes(case: Case) -> list[tuple[str, int, bool]]:
    """Returns (column, side, float64) of the forward passes of a case."""
    passes = [("default_size", case.size, False), ("odd_size", case.odd, False)]
    passes += [("float64", case.odd or case.size, True)] if case.double else []
    return [forward for forward in passes if forward[1]]


def theirs(case: Case, folder: Path) -> None:
    """Runs the reference: writes its file, its logits at every size, its gradients."""
    from tests.parity import references as ref

    arrays, state = {}, None
    for column, side, double in sizes(case):
        if case.library == "keras":
            jax.config.update("jax_enable_x64", double)
        model = ref.make(case, side, double, state)
        if state is None:
            state = ref.values(case, model)
            ref.write(case, model, folder / filename(case))
            arrays["parameters"] = np.array(ref.parameters(model))
        arrays[column] = ref.logits(case, model, rng_images(side).astype(np.float64 if double else np.float32))
    if case.train:
        side = case.odd or case.size
        if case.library == "keras":
            jax.config.update("jax_enable_x64", True)
        # In float64: in float32 a unit near zero is positive in one library and not in the other.
        model = ref.make(case, side, True, state)
        arrays["training"], grads = ref.gradients(case, model, rng_images(side, 4).astype(np.float64))
        np.savez(folder / "gradients.npz", **{name.replace("/", "|"): g for name, g in grads.items()})
    np.savez(folder / "logits.npz", **arrays)


def filename(case: Case) -> str:
    """Returns the file name of the record of this layout."""
    return f"{case.model}.npz" if case.layout == "ours" else record(case).filename


def record(case: Case) -> Any:
    """Returns the record of the case's layout and file format."""
    suffix = {"keras": ".h5", "timm": ".npz" if case.layout == "bit" else ".safetensors", "torchvision": ".pth"}
    names = (case.layout, f"{case.layout}_{case.model}")
    records = [r for r in catalogue.records(case.model) if r.layout in names]
    return next(r for r in records if r.filename.endswith(suffix[case.library]))


def ours(case: Case, folder: Path) -> dict[str, Any]:
    """Loads the file by the public API, runs our network and returns the row."""
    expected = np.load(folder / "logits.npz")
    row = {"variant": case.model, "reference": f"{case.library} {case.name}", "theirs": int(expected["parameters"])}
    for column, side, double in sizes(case):
        jax.config.update("jax_enable_x64", double)
        net, variables = load(case, folder, side)
        images = rng_images(side)
        if double:
            net = net.clone(dtype=jnp.float64)
            variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, images))
        apply = jax.jit(lambda v, x, net=net: net.apply(v, x, train=False)[0], compiler_options=conv.compiler_options())
        row[column] = difference(np.asarray(apply(variables, images)), expected[column])
        if column == "default_size":
            row["parameters"] = sum(x.size for x in trees.flatten(variables["params"]).values())
            row["control"] = difference(np.asarray(apply(mistake(variables), images)), expected[column])
    if case.train:
        jax.config.update("jax_enable_x64", True)
        row["training"] = training(case, folder, expected["training"])
    return row


def golden(case: Case) -> None:
    """Writes the logits, tensor names and running statistics of the reference to tests/goldens."""
    from tests.parity import references as ref

    side = 32 if case.model == "vgg16" else 67
    model = ref.make(case, side)
    facts, stats = ref.tensor_facts(case, model)
    of = record(case)
    facts |= {"model": case.model, "layout": of.layout, "network": dict(of.network), "side": side, "gain": case.gain}
    logits = ref.logits(case, model, rng_images(side))
    GOLDENS.mkdir(exist_ok=True)
    stored = {f"stat:{name}": value for name, value in stats.items()}
    np.savez_compressed(GOLDENS / f"{case.model}.npz", logits=logits, facts=np.array(json.dumps(facts)), **stored)


def tensor_names() -> None:
    """Writes names and shapes of the tensors of every layout, for the tests of the rules, to tests/goldens."""
    from tests.parity import references as ref

    tensors: dict[str, Any] = {}
    for case in (*CASES.values(), *LAYOUTS):
        if re.fullmatch(NAMED, case.model) and case.layout != "ours":
            model = ref.build(case, case.size)
            tensors |= {f"{case.model} {case.layout}": ref.file_shapes(case, model)}
            if case.library == "keras":
                tensors |= {f"{case.model} {case.layout} today": ref.file_shapes(case, model, today=True)}
    with gzip.GzipFile(GOLDENS / "tensor_names.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(tensors).encode())


def load(case: Case, folder: Path, side: int) -> tuple[Any, dict[str, Any]]:
    """Returns our network and the variables of the file, by the public API."""
    path = folder / filename(case)
    if case.layout != "ours":
        return lungjax.create(case.model, f"file:{path}", size=side, noncommercial=True)[:2]
    module = models.build(ModelConfig(name=case.model), 1000)
    leaves = convert(open_tensors(path), SAME_NAMES, models.leaf_shapes(module, (side, side, 3)))
    stats = {k: jnp.asarray(v) for k, v in leaves.items() if k.endswith(("/mean", "/var"))}
    params = {k: jnp.asarray(v) for k, v in leaves.items() if k not in stats}
    return module, {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference of the logits over the range of one image's logits.

    Raises AssertionError if both images have similar logits: a network that ignores its input would pass.
    """
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert np.isfinite(expected).all()
    span = np.ptp(expected, axis=1).min()
    distance = np.abs(expected[0] - expected[1]).max()
    assert distance > 0.01 * span, f"both images have similar logits: distance {distance:.1e}, range {span:.1e}"
    return float(np.abs(got - expected).max() / span)


def mistake(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns variables with mean and variance of one norm swapped, or the first bias of a network without reversed."""
    stats, params = trees.flatten(variables["batch_stats"]), trees.flatten(variables["params"])
    if stats:
        norm = sorted(stats)[len(stats) // 2].rpartition("/")[0]
        stats[f"{norm}/mean"], stats[f"{norm}/var"] = abs(stats[f"{norm}/var"]), abs(stats[f"{norm}/mean"])
    else:
        path = next(p for p in params if p.endswith("/bias") and not p.startswith("head"))
        params[path] = params[path][::-1]
    return {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}


def training(case: Case, folder: Path, expected: np.ndarray) -> float:
    """Returns the largest difference of training-mode logits and of gradients, each over its range."""
    side = case.odd or case.size
    net, variables = load(case, folder, side)
    options = {"drop_path": 0.0} if hasattr(net, "drop_path") else {}
    net = net.clone(head=replace(net.head, dropout=0.0, hidden_dropout=0.0), dtype=jnp.float64, **options)
    variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, rng_images(side, 4)))

    def loss(params: Any) -> Any:
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
        (logits, _), _ = net.apply({**variables, "params": params}, images, **options)
        return jnp.square(logits).mean(), logits

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=conv.compiler_options())
    grads, logits = run(variables["params"])
    grads, stored = trees.flatten(grads), np.load(folder / "gradients.npz")
    theirs_by_name = {name.replace("|", "/"): stored[name] for name in stored.files}
    if case.layout == "ours":
        rules, renames = SAME_NAMES, ((".", "/"), ("gamma", "scale"), ("beta", "bias"))
        for old, new in renames:
            theirs_by_name = {name.replace(old, new): g for name, g in theirs_by_name.items()}
    else:
        table = layouts(case.model)  # the gradients have the library's own names
        layout = "timm" if case.layout == "bit" else case.layout
        rules = table.get(layout) or table[f"{layout}_{case.model}"]
    expected_grads = convert(theirs_by_name, rules, {path: g.shape for path, g in grads.items()})
    worst = difference(np.asarray(logits), expected)
    # Each gradient over the largest one of its tensor; the gradient of a bias before batch norm is only rounding.
    top = max(np.abs(g).max() for g in expected_grads.values())
    for path, g in expected_grads.items():
        scale = max(np.abs(g).max(), 1e-3 * top)
        worst = max(worst, float(np.abs(np.asarray(grads[path]) - g).max() / scale))
    return worst


def run_process(*flags: str) -> subprocess.CompletedProcess:
    """Runs this module in a process with other flags."""
    command = [sys.executable, "-m", "tests.parity", *flags]
    return subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)


def compare(case: Case) -> dict[str, Any]:
    """Runs both processes of a case and returns its row."""
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        for side in ("theirs", "ours"):
            result = run_process(f"--run={side}", f"--case={case.key}", f"--folder={folder}")
            if result.returncode:
                return {"key": case.key, "failed": f"{side}: {result.stderr.strip().splitlines()[-1][:400]}"}
        row = json.loads((Path(folder) / "row.json").read_text())
    return {"key": case.key, **row, "seconds": round(time.time() - start, 1)}


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table: counts with commas, differences with two digits."""

    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 1 else f"{value:.1e}"
        return value or ""

    return f"| {' | '.join(cell(row.get(name)) for name in HEADER)} |"


def results() -> dict[str, dict[str, Any]]:
    """Returns the latest result of each case."""
    if not RESULTS.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def verdict(row: dict[str, Any]) -> str:
    """Returns "" or the columns of a result that miss their limits."""
    if "failed" in row:
        return row["failed"]
    limits = {"default_size": LIMIT, "odd_size": LIMIT, "float64": LIMIT_DOUBLE, "training": LIMIT_TRAINING}
    misses = [column for column, limit in limits.items() if row.get(column, 0) > limit]
    misses += ["parameters"] if row["parameters"] != row["theirs"] else []
    misses += ["control"] if row["control"] < 10 * LIMIT else []
    return f"TOO FAR: {', '.join(misses)}" if misses else ""


def write_readme() -> None:
    """Writes the table of all results, in the order of the cases, between the marks of README.md."""
    rows = results()
    lines = [line(rows[key]) for key in CASES if key in rows and "failed" not in rows[key]]
    heads = f"| {' | '.join(name.replace('_', ' ') for name in HEADER)} |\n|{' --- |' * len(HEADER)}\n"
    start, end = "<!-- table -->\n", "<!-- end -->\n"
    before, rest = README.read_text().split(start)
    README.write_text(before + start + heads + "\n".join(lines) + "\n" + end + rest.split(end)[1])


def main() -> None:
    """Parses the arguments and runs the comparisons without a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="", help="regex over 'variant library:name'")
    parser.add_argument("--again", action="store_true", help="repeat comparisons in results.jsonl")
    parser.add_argument("--goldens", action="store_true", help="write tests/goldens instead")
    parser.add_argument("--run", choices=("theirs", "ours", "golden", "names"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run == "names":
        return tensor_names()
    if args.run:
        case = CASES[args.case]
        if args.run == "golden":
            golden(case)
        elif args.run == "theirs":
            theirs(case, args.folder)
        else:
            (args.folder / "row.json").write_text(json.dumps(ours(case, args.folder)))
        return None
    if args.goldens:
        for key in (key for key in CASES if key.startswith(GOLDEN) and re.search(args.models, key)):
            run_process("--run=golden", f"--case={key}").check_returncode()
        return run_process("--run=names").check_returncode()
    skip = {} if args.again else results()
    failed = False
    for key, case in CASES.items():
        if not re.search(args.models, key) or (key in skip and "failed" not in skip[key]):
            continue
        row = compare(case)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        problem = verdict(row)
        failed |= bool(problem)
        print(line(row), problem, flush=True)
    write_readme()
    sys.exit(failed)


if __name__ == "__main__":
    main()
