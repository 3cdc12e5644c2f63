"""Every network against its references, through files in the released formats.

python -m pytest -m slow -s tests/parity/test_networks.py [-k "resnet18 or vgg"]       (`parity` extra; README.md)

Each comparison prints a row of the table in README.md. The reference and our network run one after the other in
separate processes, so that the largest networks fit into memory.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.cases import CASES, Case

LIMITS = {"default size": 1e-4, "odd size": 1e-4, "float64": 1e-9, "training": 1e-6}  # Keras has float32 constants
CONTROL = 1e-3


def images(side: int, count: int = 2) -> np.ndarray:
    """Returns normalized images [count, side, side, 3]."""
    return np.random.default_rng(side).normal(size=(count, side, side, 3)).astype(np.float32)


def passes(case: Case) -> list[tuple[str, int, bool]]:
    """Returns (column, side, float64) for each forward pass of a case."""
    columns = [("default size", case.size, False), ("odd size", case.odd, False)]
    columns += [("float64", case.odd or case.size, True)] if case.double else []
    return [column for column in columns if column[1]]


def run_reference(case: Case, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Writes the weights of the reference; returns the path, and logits of each pass, parameters and gradients."""
    from tests.parity import references

    reference = references.make(case, case.size)
    path, arrays = references.write(reference, folder), reference.arrays()
    results: dict[str, Any] = {"parameters": reference.parameters()}
    for column, side, double in passes(case):
        reference = references.build(case, side, double)
        reference.assign(arrays)
        results[column] = reference.logits(images(side))
    if case.train:
        # In float64, since in float32 a unit near zero may be positive in only one library.
        reference = references.build(case, case.odd or case.size, True)
        reference.assign(arrays)
        results["training"], results["gradients"] = reference.gradients(images(case.odd or case.size, 4))
    return path, results


def run_ours(case: Case, path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Loads the file through the public API and runs our network; returns the cells of a row."""
    import jax
    import jax.numpy as jnp

    from lungjax.models import trees
    from lungjax.models.ops import conv

    cells: dict[str, Any] = {}
    for column, side, double in passes(case):
        jax.config.update("jax_enable_x64", double)
        net, variables = load(case, path, side)
        inputs = images(side)[..., : case.channels]
        if double:
            net = net.clone(dtype=jnp.float64)
            variables, inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, inputs))

        def forward(v: Any, x: Any, net: Any = net) -> Any:
            logits, features = net.apply(v, x, train=False)
            return features["last"].mean((1, 2)) if case.headless else logits

        apply = conv.jit(forward)
        cells[column] = difference(apply(variables, inputs), expected[column])
        if column == "default size":
            params = trees.flatten(variables["params"])
            cells["parameters"] = sum(params[p].size for p in params if not (case.headless and p.startswith("head/")))
            cells["control"] = difference(apply(mistake(variables), inputs), expected[column])
    if case.train:
        jax.config.update("jax_enable_x64", True)
        cells["training"] = training(case, path, expected)
    return cells


def load(case: Case, path: Path, side: int) -> tuple[Any, dict[str, Any]]:
    """Returns our network and the variables of the file, loaded through the public API."""
    import lungjax

    if case.layout != "ours":
        classes = 2 if case.headless else None
        return lungjax.create(case.model, f"file:{path}", classes, size=side, noncommercial=True)[:2]
    from lungjax import models
    from lungjax.config import ModelConfig
    from lungjax.models import trees

    with np.load(path) as file:  # has our names
        leaves = dict(file)
    stats = {key: leaves.pop(key) for key in list(leaves) if key.endswith(("/mean", "/var"))}
    module = models.build(ModelConfig(name=case.model), 1000)
    return module, {"params": trees.unflatten(leaves), "batch_stats": trees.unflatten(stats)}


def difference(logits: Any, expected: np.ndarray) -> float:
    """Returns the largest difference in the logits, relative to their range for one image.

    Raises AssertionError if two images have similar logits, since a network that ignores its input would pass.
    """
    logits = np.asarray(logits)
    assert logits.shape == expected.shape and np.isfinite(expected).all()
    span = np.ptp(expected, axis=1).min()
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * span
    return float(np.abs(logits - expected).max() / span)


def mistake(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns variables with the mean and variance of a norm swapped or, if there is no norm, with a bias reversed."""
    from lungjax.models import trees

    stats, params = trees.flatten(variables["batch_stats"]), trees.flatten(variables["params"])
    if stats:
        norm = sorted(stats)[len(stats) // 2].rpartition("/")[0]
        stats[f"{norm}/mean"], stats[f"{norm}/var"] = abs(stats[f"{norm}/var"]), abs(stats[f"{norm}/mean"])
    else:
        path = next(path for path in params if path.endswith("/bias") and not path.startswith("head"))
        params[path] = params[path][::-1]
    return {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}


def training(case: Case, path: Path, expected: dict[str, Any]) -> float:
    """Returns the largest difference in logits and gradients in training mode, relative to their range."""
    import jax
    import jax.numpy as jnp

    from lungjax.models import trees
    from lungjax.models.ops import conv
    from lungjax.weights.convert import SAME_NAMES, convert
    from lungjax.weights.name_rules import layouts

    side = case.odd or case.size
    net, variables = load(case, path, side)
    options = {"drop_path": 0.0} if hasattr(net, "drop_path") else {}
    net = net.clone(head=replace(net.head, dropout=0.0, hidden_dropout=0.0), dtype=jnp.float64, **options)
    variables, inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, images(side, 4)))

    def loss(params: Any) -> Any:
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
        (logits, _), _ = net.apply({**variables, "params": params}, inputs, **options)
        return jnp.square(logits).mean(), logits

    run = conv.jit(jax.grad(loss, has_aux=True))
    grads, logits = run(variables["params"])
    grads, by_name = trees.flatten(grads), expected["gradients"]
    if case.layout == "ours":
        rules = SAME_NAMES
        for old, new in ((".", "/"), ("gamma", "scale"), ("beta", "bias")):
            by_name = {name.replace(old, new): gradient for name, gradient in by_name.items()}
    else:
        table = layouts(case.model)  # gradients have the names of the library
        layout = "timm" if case.layout == "bit" else case.layout
        rules = table.get(layout) or table[f"{layout}_{case.model}"]
    expected_grads = convert(by_name, rules, {path: g.shape for path, g in grads.items()})
    # Relative to the largest gradient of each tensor; the gradient of a bias before batch norm is only rounding.
    top = max(np.abs(g).max() for g in expected_grads.values())
    differences = [
        float(np.abs(np.asarray(grads[path]) - g).max() / max(np.abs(g).max(), 1e-3 * top))
        for path, g in expected_grads.items()
    ]
    return max(difference(logits, expected["training"]), *differences)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a call in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_network_against_reference(key, tmp_path):
    case = CASES[key]
    path, expected = in_process(run_reference, case, tmp_path)
    cells = in_process(run_ours, case, path, expected)
    values = [f"{cells[name]:.1e}" if name in cells else "" for name in (*LIMITS, "control")]
    name = f"{case.tag or case.library} {case.name}"
    print("\n|", " | ".join([case.model, name, f"{cells['parameters']:,}", *values]), "|")
    assert cells["parameters"] == expected["parameters"]
    assert {name: cells[name] for name, limit in LIMITS.items() if cells.get(name, 0) > limit} == {}
    assert cells["control"] > CONTROL
