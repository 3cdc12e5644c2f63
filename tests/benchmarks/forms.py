"""Times training steps of lungjax with one CPU form of `models/ops` at a time replaced by XLA's plain operation.

    python -m tests.benchmarks.forms [--forms=NAME,...] [--rounds=5]
    XLA_FLAGS=--xla_cpu_max_isa=AVX2 python -m tests.benchmarks.forms

A ratio above 1 means that the form pays: the step takes that many times as long without it.
"""

import statistics
from collections.abc import Callable
from typing import Any

from tests.benchmarks import harness
from tests.benchmarks.train_peers import contender

NETWORKS = {  # form and a network that uses it
    "depthwise forward": "mobilenetv2",
    "depthwise dx": "mobilenetv2",
    "depthwise dkernel": "mobilenetv2",
    "3 channels forward": "mobilenetv2",
    "batch norm forward": "mobilenetv2",
    "batch norm backward": "mobilenetv2",
    "isolated fusions": "mobilenetv2",
    "product gradients": "mobilenetv2",
    "products by YNNPACK": "mobilenetv2",
    "reductions by YNNPACK": "mobilenetv2",
    "vectors of 512 bits": "mobilenetv2",
    "window max": "cbr_larget",
    "window max dx": "cbr_larget",
    "strided or valid dx": "cbr_larget",
    "average pool": "densenet121",
    "GELU": "convnext_tiny",
    "none": "mobilenetv2",  # the noise of the comparison
}


def replacements() -> dict[str, dict[tuple[Any, str], Any]]:
    """Returns the attributes that each form replaces, with the plain operations."""
    from flax import linen as nn

    from lungjax.models import convnext, densenet
    from lungjax.models.ops import batch_norm, conv, gelu, pooling

    def plain_if(depthwise: bool, plain: Callable, function: Callable) -> Callable:
        def choose(x: Any, kernel: Any, *args: Any, **options: Any) -> Any:
            return (plain if conv._is_depthwise(x, kernel) == depthwise else function)(x, kernel, *args, **options)

        return choose

    def with_option(name: str, value: Any) -> Callable:
        options = conv.compiler_options
        return lambda *args, **fields: options(*args, **fields) | {name: value}

    fusions, modules = "xla_cpu_experimental_ynn_fusion_type", (batch_norm, conv, gelu, pooling)
    return {
        "depthwise forward": {(conv, "_forward"): plain_if(True, conv.plain_conv, conv._forward)},
        "3 channels forward": {(conv, "_forward"): plain_if(False, conv.plain_conv, conv._forward)},
        "depthwise dx": {(conv, "_dx"): plain_if(True, conv._plain_dx, conv._dx)},
        "strided or valid dx": {(conv, "_dx"): plain_if(False, conv._plain_dx, conv._dx)},
        "depthwise dkernel": {(conv, "_depthwise_dkernel"): conv._plain_dkernel},
        "product gradients": {(conv, "product"): conv.product.fun},
        "batch norm forward": {(batch_norm, "_forward"): batch_norm._plain},
        "batch norm backward": {(batch_norm, "_backward"): batch_norm._plain_backward},
        "window max": {(pooling, "_window_max"): pooling.plain_window_max},
        "window max dx": {(pooling, "_window_max_dx"): pooling._plain_window_max_dx},
        "average pool": {(densenet, "avg_pool_2x2"): lambda x: nn.avg_pool(x, (2, 2), (2, 2))},
        "GELU": {(convnext, "gelu"): gelu.plain_gelu},
        "isolated fusions": {(m, "isolate_fusion"): lambda function, *args: function(*args) for m in modules},
        "products by YNNPACK": {(conv, "compiler_options"): with_option(fusions, "LIBRARY_FUSION_TYPE_REDUCE")},
        "reductions by YNNPACK": {
            (conv, "compiler_options"): with_option(fusions, "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
        },
        "none": {},
        "vectors of 512 bits": {(conv, "compiler_options"): with_option("xla_cpu_prefer_vector_width", 256)},
    }


def variant(network: str, form: str = "") -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Compiles a training step without `form`; returns facts, and a function that times one turn."""
    if form:
        harness.keep_freed_memory()
        for (module, name), plain in replacements()[form].items():
            setattr(module, name, plain)
    return contender("ours", network)


def main() -> None:
    args = harness.parse(__doc__, forms=list(NETWORKS), rounds=5)
    rows = []
    for form in args.forms:
        processes = {}
        for name in ("", form):  # one after the other, so that each compiles alone
            processes[name] = harness.Process("", "forms", "variant", network=NETWORKS[form], form=name)
            processes[name].answer()
        turns = harness.take_turns({name: process.ask for name, process in processes.items()}, args.rounds)
        for process in processes.values():
            process.close()
        seconds = {name: [turn["seconds"] for turn in own] for name, own in turns.items()}
        cells = [f"{1e3 * statistics.median(seconds[name]):.1f}" for name in processes]
        rows.append([form, NETWORKS[form], *cells, harness.ratio(seconds[form], seconds[""])])
        print(harness.table(["form", "network", "with, ms", "without, ms", "ratio"], rows), flush=True)


if __name__ == "__main__":
    main()
