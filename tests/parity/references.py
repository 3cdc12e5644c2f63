"""Reference networks with random weights, their tensor names and files."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.weights import catalogue
from tests.parity.cases import Case
from tests.random_weights import draw

MEANS, VARIANCES = re.compile(r"(moving|running)_mean$"), re.compile(r"(moving|running)_var(iance)?$")


class Reference:
    """A network of another library in evaluation mode; `names` lists its tensors in order.

    Subclasses are in `keras_reference` and `torch_reference`.
    """

    case: Case
    model: Any
    names: list[str]

    @property
    def shift(self) -> float:
        """The `shift` for `draw`: 1 for networks with batch norm, 0 for others."""
        return float(any(map(VARIANCES.search, self.names)))

    def randomize(self, side: int) -> None:
        """Draws random weights, and running statistics that are those of random images, perturbed by up to half.

        With completely random statistics, the output of a deep network would not depend on its input.
        """
        self.assign([self.random_array(name, array.shape) for name, array in self.tensors()])
        if self.shift:
            arrays = self.with_batch_statistics(np.random.default_rng(0).normal(size=(4, side, side, 3)))
            for i, name in enumerate(self.names):
                if VARIANCES.search(name):
                    arrays[i] = arrays[i] * draw(name, arrays[i].shape)  # 0.5..1.5
                elif MEANS.search(name):
                    arrays[i] = arrays[i] + draw(name, arrays[i].shape)
            self.assign(arrays)

    def random_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.startswith("normalization"):  # of the input of Keras's EfficientNet, which is already normalized
            return np.full(shape, 1.0 if "variance" in name else 0.0)
        return draw(name, shape, self.case.gain, self.shift) if shape else np.zeros(())

    def tensors(self) -> list[tuple[str, np.ndarray]]:
        """Returns names and arrays of all tensors in a released file."""
        return list(zip(self.names, self.arrays(), strict=True))

    def file_shapes(self, own_names: bool = False) -> dict[str, list[int]]:
        """Returns the shapes of all tensors by their names in the file or, with `own_names`, in the library."""
        return {
            name if own_names else self.file_name(name, array.shape): list(self.file_array(array).shape)
            for name, array in self.tensors() if not name.startswith("normalization")
        }  # fmt: skip

    def facts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns facts, and running statistics by their names in the file.

        Facts: {"shift": for `draw`, "tensors": {name in the file: [name for `draw`, shape, whether transposed]}}.
        """
        facts, statistics = {}, {}
        for name, array in self.tensors():
            if array.shape and not name.startswith("normalization"):
                key = self.file_name(name, array.shape)
                facts[key] = [name, list(array.shape), self.case.layout == "bit" and array.ndim == 4]
                if MEANS.search(name) or VARIANCES.search(name):
                    statistics[key] = array
        return {"shift": self.shift, "tensors": facts}, statistics


def build(case: Case, side: int, double: bool = False) -> Any:
    """Returns the reference network for images of `side` pixels, with its initial weights."""
    if case.library == "keras":
        from tests.parity.keras_reference import KerasReference

        return KerasReference(case, side, double)
    from tests.parity.torch_reference import TorchReference

    return TorchReference(case, double)


def make(case: Case, side: int) -> Any:
    """Returns the reference network for images of `side` pixels, with random weights."""
    reference = build(case, side)
    reference.randomize(side)
    return reference


def record(case: Case) -> Any:
    """Returns the record with the tag, or else the layout and file format, of a case."""
    if case.tag:
        return catalogue.find(f"{case.model}.{case.tag}")
    suffix = {"keras": ".h5", "timm": ".npz" if case.layout == "bit" else ".safetensors", "torchvision": ".pth"}
    names = (case.layout, f"{case.layout}_{case.model}")
    records = [r for r in catalogue.records(case.model) if r.layout in names]
    return next(r for r in records if r.filename.endswith(suffix[case.library]))


def write(reference: Any, folder: Path) -> Path:
    """Writes the weights in the released format; returns the path of the file."""
    case = reference.case
    path = folder / (f"{case.model}.npz" if case.layout == "ours" else record(case).filename)
    reference.write(path)
    return path
