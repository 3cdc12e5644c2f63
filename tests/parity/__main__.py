"""Compares networks with their references: python -m tests.parity [--models=REGEX] [--again] [--goldens]

Needs the extra `parity` (and for most networks torch). Every comparison is two processes, the reference's and
ours, so that the largest fit into memory one after the other. Each result is appended to results.jsonl, and
README.md is written from it; a comparison that is there already is not done again.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.cases import CASES, Case

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.jsonl", HERE / "README.md"
GOLDENS = HERE.parent / "goldens"
LIMIT = 1e-4
LIMIT_DOUBLE = 1e-9
LIMIT_TRAINING = 1e-6  # float64, but Keras and torch have some constants of float32
HEADER = (
    "variant", "reference", "parameters", "theirs", "default size", "odd size", "float64", "training", "control",
    "seconds",
)  # fmt: skip


def rng_images(side: int, count: int = 2) -> np.ndarray:
    """Normalised images [count, side, side, 3]."""
    return np.random.default_rng(side).normal(size=(count, side, side, 3)).astype(np.float32)


def sizes(case: Case) -> list[tuple[str, int, bool]]:
    """Returns (what, side, float64) of the forward passes of a case."""
    found = [("default size", case.size, False)]
    if case.odd:
        found.append(("odd size", case.odd, False))
    if case.double:
        found.append(("float64", case.odd or case.size, True))
    return found


def theirs(case: Case, folder: Path) -> None:
    """Runs the reference: its file, its logits at every size, its gradients."""
    import jax

    from tests.parity import references as ref

    facts: dict[str, Any] = {}
    arrays = {}
    state = None
    for what, side, double in sizes(case):
        if case.library == "keras":
            jax.config.update("jax_enable_x64", double)
        model = ref.make(case, side, double, state)
        if state is None:
            state = ref.values(case, model)
            ref.write(case, model, folder / filename(case))
            facts["parameters"] = ref.parameters(model)
        images = rng_images(side)
        arrays[what] = ref.logits(case, model, images.astype(np.float64) if double else images)
    if case.train:
        side = case.odd or case.size
        if case.library == "keras":
            jax.config.update("jax_enable_x64", True)
        # In float64: in float32 a unit near zero opens in one library and not in the other.
        model = ref.make(case, side, True, state)
        arrays["training"], grads = ref.gradients(case, model, rng_images(side, 4).astype(np.float64))
        np.savez(folder / "gradients.npz", **{name.replace("/", "|"): g for name, g in grads.items()})
    np.savez(folder / "logits.npz", **arrays)
    (folder / "facts.json").write_text(json.dumps(facts))


def filename(case: Case) -> str:
    """The name that the record of this layout gives to its file."""
    return f"{case.model}.npz" if case.layout == "ours" else record(case).filename


def record(case: Case) -> Any:
    """The record of the case's layout and kind of file."""
    from lungjax.weights import catalogue

    suffix = {"keras": ".h5", "timm": ".npz" if case.layout == "bit" else ".safetensors", "torchvision": ".pth"}
    layouts = (case.layout, f"{case.layout}_{case.model}")
    known = [r for r in catalogue.records(case.model) if r.layout in layouts]
    return next(r for r in known if r.filename.endswith(suffix[case.library]))


def ours(case: Case, folder: Path) -> dict[str, Any]:
    """Loads the file by the public path, runs our network and returns the row."""
    import jax
    import jax.numpy as jnp

    from lungjax.models import trees
    from lungjax.models.ops import conv

    expected = np.load(folder / "logits.npz")
    facts = json.loads((folder / "facts.json").read_text())
    row: dict[str, Any] = {
        "variant": case.model,
        "reference": f"{case.library} {case.name}",
        "theirs": facts["parameters"],
    }
    for what, side, double in sizes(case):
        jax.config.update("jax_enable_x64", double)
        net, variables = load(case, folder, side)
        images = rng_images(side)
        if double:
            net = net.clone(dtype=jnp.float64)
            variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, images))
        apply = jax.jit(lambda v, x, net=net: net.apply(v, x, train=False)[0], compiler_options=conv.compiler_options())
        row[what] = difference(np.asarray(apply(variables, images)), expected[what])
        if what == "default size":
            row["parameters"] = sum(x.size for x in trees.flatten(variables["params"]).values())
        if what == sizes(case)[0][0]:
            row["control"] = control(
                variables, lambda v, run=apply, images=images: np.asarray(run(v, images)), expected[what]
            )
    if case.train:
        jax.config.update("jax_enable_x64", True)
        row["training"] = training(case, folder, expected["training"])
    return row


# One small case a family, at few pixels: what the ordinary tests compare with.
SMALL = {
    "efficientnet_lite0 timm:tf_efficientnet_lite0": 67,
    "efficientnet_b0 timm:tf_efficientnet_b0": 67,
    "efficientnetv2_b0 timm:tf_efficientnetv2_b0": 67,
    "resnet18 torchvision:resnet18": 67,
    "resnet50v2 keras:ResNet50V2": 67,
    "bit_r50x1 timm:resnetv2_50x1_bit": 67,
    "convnextv2_atto timm:convnextv2_atto": 67,
    "densenet121 torchvision:densenet121": 67,
    "vgg16 keras:VGG16": 32,
    "mobilenet keras:MobileNet": 67,
    "mobilenetv2 torchvision:mobilenet_v2": 67,
    "mobilenetv3_small timm:tf_mobilenetv3_small_100": 67,
}


def golden(case: Case, side: int) -> None:
    """Writes the reference's logits, its tensors' names and its running statistics to tests/goldens."""
    from tests.parity import references as ref

    model = ref.make(case, side)
    facts, stats = ref.tensor_facts(case, model)
    of = record(case)
    facts |= {"model": case.model, "layout": of.layout, "network": dict(of.network), "side": side, "gain": case.gain}
    logits = ref.logits(case, model, rng_images(side))
    GOLDENS.mkdir(exist_ok=True)
    stored = {f"stat:{name}": value for name, value in stats.items()}
    np.savez_compressed(GOLDENS / f"{case.model}.npz", logits=logits, facts=np.array(json.dumps(facts)), **stored)


def load(case: Case, folder: Path, side: int) -> tuple[Any, dict[str, Any]]:
    """Returns our network and the variables of the file, by the path that users take."""
    import jax.numpy as jnp

    import lungjax
    from lungjax import models
    from lungjax.config import ModelConfig
    from lungjax.models import leaf_shapes, trees
    from lungjax.weights.convert import SAME_NAMES, convert
    from lungjax.weights.readers import open_tensors

    path = folder / filename(case)
    if case.layout != "ours":
        return lungjax.create(case.model, f"file:{path}", size=side, noncommercial=True)[:2]
    module = models.build(ModelConfig(name=case.model), 1000)
    leaves = convert(open_tensors(path), SAME_NAMES, leaf_shapes(module, (side, side, 3)))
    stats = {k: jnp.asarray(v) for k, v in leaves.items() if k.endswith(("/mean", "/var"))}
    params = {k: jnp.asarray(v) for k, v in leaves.items() if k not in stats}
    return module, {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference of logits over the range of one image's logits.

    Raises AssertionError if the images' logits are alike: then a network that looks away would pass.
    """
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert np.isfinite(expected).all()
    span = np.ptp(expected, axis=1).min()
    apart = np.abs(expected[0] - expected[1]).max()
    assert apart > 0.01 * span, f"the two images' logits are alike: {apart:.1e} apart, range {span:.1e}"
    return float(np.abs(got - expected).max() / span)


def control(variables: dict[str, Any], run: Any, expected: np.ndarray) -> float | None:
    """Returns the difference when a mistake is made on purpose, which must show.

    Mean and variance of one norm swapped; the two biases of a network without running statistics reversed.
    """
    from lungjax.models import trees

    stats, params = trees.flatten(variables["batch_stats"]), trees.flatten(variables["params"])
    if stats:
        where = sorted(stats)[len(stats) // 2].rpartition("/")[0]
        stats[f"{where}/mean"], stats[f"{where}/var"] = abs(stats[f"{where}/var"]), abs(stats[f"{where}/mean"])
    else:
        for path in [p for p in params if p.endswith("/bias") and not p.startswith("head")][:1]:
            params[path] = params[path][::-1]
    wrong = {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}
    return difference(run(wrong), expected)


def training(case: Case, folder: Path, expected: np.ndarray) -> float:
    """Returns the largest difference of training-mode logits and of gradients, each over its range."""
    import jax
    import jax.numpy as jnp

    from lungjax.models import trees
    from lungjax.models.ops import conv
    from lungjax.weights.convert import SAME_NAMES, convert
    from lungjax.weights.rules import layouts

    side = case.odd or case.size
    net, variables = load(case, folder, side)
    quiet = {"dropout": 0.0, "hidden_dropout": 0.0}
    options = {"drop_path": 0.0} if hasattr(net, "drop_path") else {}
    net = net.clone(head=replace(net.head, **quiet), dtype=jnp.float64, **options)
    variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, rng_images(side, 4)))

    def loss(params: Any) -> Any:
        out, _ = net.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"],
                           rngs={"dropout": jax.random.key(0)})  # fmt: skip
        return jnp.square(out[0]).mean(), out[0]

    options = {"compiler_options": conv.compiler_options()}
    grads, got = jax.jit(jax.grad(loss, has_aux=True), **options)(variables["params"])
    grads = trees.flatten(grads)
    stored = np.load(folder / "gradients.npz")
    theirs_by_name = {name.replace("|", "/"): stored[name] for name in stored.files}
    if case.layout == "ours":
        layer = {
            name: name.replace(".", "/").replace("gamma", "scale").replace("beta", "bias") for name in theirs_by_name
        }
        theirs_by_name, rules = {layer[name]: g for name, g in theirs_by_name.items()}, SAME_NAMES
    else:
        known = layouts(case.model)  # the gradients have the library's own names
        wanted_layout = "timm" if case.layout == "bit" else case.layout
        rules = known.get(wanted_layout) or known[f"{wanted_layout}_{case.model}"]
    shapes = {path: g.shape for path, g in grads.items()}
    wanted = convert(theirs_by_name, rules, shapes)
    worst = difference(np.asarray(got), expected)
    # Each gradient over the largest one of its tensor; a bias before BatchNorm has none but rounding.
    top = max(np.abs(g).max() for g in wanted.values())
    for path, g in wanted.items():
        scale = max(np.abs(g).max(), 1e-3 * top)
        worst = max(worst, float(np.abs(np.asarray(grads[path]) - g).max() / scale))
    return worst


def compare(case: Case) -> dict[str, Any]:
    """Runs both processes of a case and returns its row."""
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        for side in ("theirs", "ours"):
            command = [
                sys.executable,
                "-m",
                "tests.parity",
                f"--run={side}",
                f"--case={case.key}",
                f"--folder={folder}",
            ]
            result = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
            if result.returncode:
                return {"key": case.key, "failed": f"{side}: {result.stderr.strip().splitlines()[-1][:400]}"}
        row = json.loads((Path(folder) / "row.json").read_text())
    return {"key": case.key, **row, "seconds": round(time.time() - started, 1)}


def render() -> str:
    """Returns the table of all results, in the order of the cases."""
    rows = results()
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for key in CASES:
        if key in rows and "failed" not in rows[key]:
            lines.append(f"| {' | '.join(cell(rows[key].get(name)) for name in HEADER)} |")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A number of the table: counts with commas, differences with two digits."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1 else f"{value:.1e}"
    return str(value)


def results() -> dict[str, dict[str, Any]]:
    """Returns the latest result of each case."""
    if not RESULTS.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def verdict(row: dict[str, Any]) -> str:
    """Returns "ok" or what is wrong with a result."""
    if "failed" in row:
        return row["failed"]
    wrong = [what for what in ("default size", "odd size") if row.get(what, 0) > LIMIT]
    wrong += ["float64"] if row.get("float64", 0) > LIMIT_DOUBLE else []
    wrong += ["training"] if row.get("training", 0) > LIMIT_TRAINING else []
    wrong += ["parameters"] if row["parameters"] != row["theirs"] else []
    wrong += ["control"] if (row.get("control") or 1) < 10 * LIMIT else []
    return "TOO FAR: " + ", ".join(wrong) if wrong else "ok"


def main() -> None:
    """Parses the arguments and runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="", help="regex over 'variant library:name'")
    parser.add_argument("--again", action="store_true", help="also what is in results.jsonl")
    parser.add_argument("--goldens", action="store_true", help="write tests/goldens instead, one a process")
    parser.add_argument("--run", choices=("theirs", "ours", "golden"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        case, folder = CASES[args.case], Path(args.folder or ".")
        if args.run == "golden":
            golden(case, SMALL[args.case])
        elif args.run == "theirs":
            theirs(case, folder)
        else:
            (folder / "row.json").write_text(json.dumps(ours(case, folder)))
        return
    if args.goldens:
        for key in filter(re.compile(args.models).search, SMALL):
            command = [sys.executable, "-m", "tests.parity", "--run=golden", f"--case={key}"]
            subprocess.run(command, cwd=HERE.parents[1], check=True)
        return
    done = {} if args.again else results()
    failed = False
    for key, case in CASES.items():
        if not re.search(args.models, key) or (key in done and "failed" not in done[key]):
            continue
        row = compare(case)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = verdict(row)
        failed |= said != "ok"
        print(f"| {' | '.join(cell(row.get(name)) for name in HEADER)} | {said if said != 'ok' else ''}", flush=True)
    write_readme()
    sys.exit(failed)


def write_readme() -> None:
    """Puts the table into README.md between its marks."""
    if README.exists():
        text = README.read_text()
        start, end = "<!-- table -->\n", "<!-- end -->\n"
        before, rest = text.split(start)
        README.write_text(before + start + render() + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
