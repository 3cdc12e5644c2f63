"""Networks of timm, torchvision and torchxrayvision as references."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file

from tests.parity import cpu_torchvision  # noqa: F401
from tests.parity.cases import Case
from tests.parity.references import Reference, record
from tests.parity.released import bit_name


class Backbone(torch.nn.Module):
    """A network without its classifier, with the tensor names of RadImageNet's files; returns pooled features."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(*list(network.children())[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x).relu().mean((2, 3))


def xrv_network(case: Case) -> torch.nn.Module:
    """Returns torchxrayvision's network, whose ResNet can only be built from a file."""
    import torchvision
    import torchxrayvision as xrv

    if case.name == "DenseNet":
        return xrv.models.DenseNet()
    network = torchvision.models.resnet50(num_classes=18)
    network.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    with TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder, record(case).filename))
        return xrv.models.ResNet("resnet50-res512-all", cache_dir=folder).model


class TorchReference(Reference):
    def __init__(self, case: Case, double: bool = False) -> None:
        if case.library == "timm":
            import timm

            model = timm.create_model(case.name)
        elif case.library == "xrv":
            model = xrv_network(case)
        else:
            import torchvision

            model = getattr(torchvision.models, case.name)()
            model = Backbone(model) if case.headless else model
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
            if hasattr(layer, "drop_rate"):
                layer.drop_rate = 0.0
            if type(layer).__name__ in ("StdConv2d", "StdConv2dSame"):
                layer.eps = 1e-10  # as in the released code; timm has 1e-8
        self.dtype = torch.float64 if double else torch.float32
        self.case, self.model = case, model.to(self.dtype).eval()
        self.names = list(model.state_dict())

    def arrays(self) -> list[np.ndarray]:
        return [value.numpy().copy() for value in self.model.state_dict().values()]

    def assign(self, arrays: list[np.ndarray]) -> None:
        old = self.model.state_dict()
        pairs = zip(old.items(), arrays, strict=True)
        self.model.load_state_dict(
            {name: torch.from_numpy(np.asarray(a)).to(value.dtype) for (name, value), a in pairs}
        )

    def with_batch_statistics(self, images: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays, with the statistics of `images` as running statistics."""
        for layer in self.model.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.momentum = 1.0
        self.model.train()
        self.logits(images)
        self.model.eval()
        return self.arrays()

    def feed(self, images: np.ndarray) -> torch.Tensor:
        """Converts normalized RGB images to the input of the network."""
        return torch.from_numpy(images[..., : self.case.channels]).to(self.dtype).permute(0, 3, 1, 2).contiguous()

    def logits(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(self.feed(images)).numpy()

    def gradients(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the logits in training mode, and the gradients of their mean square by the library's names."""
        self.model.train()
        out = self.model(self.feed(images))
        (out**2).mean().backward()
        self.model.eval()
        return out.detach().numpy(), {name: p.grad.numpy() for name, p in self.model.named_parameters()}

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def file_array(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(2, 3, 1, 0) if self.case.layout == "bit" and array.ndim == 4 else array

    def file_name(self, name: str, shape: tuple[int, ...]) -> str:
        return bit_name(name) if self.case.layout == "bit" else name

    def write(self, path: Path) -> None:
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        if path.suffix == ".npz":
            np.savez(path, **{bit_name(name): self.file_array(value.numpy()) for name, value in state.items()})
        elif path.suffix == ".safetensors":
            save_file(state, path)
        elif self.case.library == "xrv" and self.case.name == "DenseNet":  # as released: a module, before torch 1.6
            torch.save(self.model, path, _use_new_zipfile_serialization=False)
        else:
            torch.save(state, path)
