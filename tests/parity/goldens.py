"""Writes tests/goldens, the references of the ordinary tests: python -m tests.parity.goldens"""

import gzip
import json
import re
from pathlib import Path

import numpy as np

from tests.parity import references
from tests.parity.cases import CASES, GOLDEN, LAYOUTS, NAMED
from tests.parity.test_networks import images

GOLDENS = Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes logits, tensor names and running statistics of one network per family, and the tensor names per layout."""
    for case in (case for key, case in CASES.items() if key.startswith(GOLDEN)):
        side = 32 if case.model == "vgg16" else 67
        reference, record = references.make(case, side), references.record(case)
        facts, stats = reference.facts()
        facts |= {"model": case.model, "layout": record.layout, "network": dict(record.network)}
        facts |= {"side": side, "gain": case.gain}
        arrays = {f"stat:{name}": value for name, value in stats.items()} | {"logits": reference.logits(images(side))}
        np.savez_compressed(GOLDENS / f"{case.model}.npz", facts=np.array(json.dumps(facts)), **arrays)
    shapes = {}
    for case in (*CASES.values(), *LAYOUTS):
        if re.fullmatch(NAMED, case.model) and case.layout != "ours" and not case.tag:
            reference = references.build(case, case.size)
            shapes[f"{case.model} {case.layout}"] = reference.file_shapes()
            if case.library == "keras":
                shapes[f"{case.model} {case.layout} today"] = reference.file_shapes(own_names=True)
    with gzip.GzipFile(GOLDENS / "tensor_names.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(shapes).encode())


if __name__ == "__main__":
    main()
