"""The baselines of MedMNIST on PneumoniaMNIST, ChestMNIST and OrganAMNIST: ResNet-18 and ResNet-50 from random weights.

    python -m lungjax.prepare --dataset=medmnist/pneumonia --source=FOLDER   # of pneumoniamnist.npz
    python -m lungjax.main --experiment=medmnist:subset=pneumonia,model=resnet18,protocol=study
    python -m lungjax.main --experiment=medmnist:subset=organa,model=resnet50,size=224
    python -m lungjax.tables --table=medmnist_pneumonia --workdir=runs/tables --run --seeds=3

Source: Yang et al., Scientific Data 10, 2023 (arXiv 2110.14795), and github.com/MedMNIST/experiments. The published AUC
/ accuracy of ResNet-18 at 28 pixels is .944 / .854 on PneumoniaMNIST, .768 / .947 on ChestMNIST and .997 / .935 on
OrganAMNIST. Adam with learning rate 1e-3, a tenth after 50 and 75 of 100 epochs, batch 128, no augmentation; the best
epoch by AUC on val is tested. At 28 pixels, the networks are the CIFAR variants; at 224 pixels, those of torchvision.

| | study | clean |
| --- | --- | --- |
| splits | those of the archive | without near duplicates of later splits |
| size=224 | the images of 28 pixels, each pixel enlarged to 8 x 8 | the archive of 224 pixels (medmnist/..._224) |
| computation on GPU, TPU | float32 | bfloat16 |

Caveats: their script keeps a reference to the network instead of a copy, so it may have tested the last epoch; the
paper says the best one. The 28-pixel networks start from torch's default initialization, ours from that of torchvision.
ChestMNIST has 14 findings, almost all absent, so that an accuracy of .947 is that of always predicting "absent".
OrganAMNIST lost 20 of 34,581 train images in version 3. This experiment has not been run on the real data sets.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, slug

NETWORKS = {
    28: {"resnet18": "resnet18_cifar", "resnet50": "resnet50_cifar"},
    224: {"resnet18": "resnet18", "resnet50": "resnet50_v15"},
}


def get_config(subset: str = "pneumonia", model: str = "resnet18", size: int = 28, protocol: str = "clean") -> Config:
    """Arguments: subset (pneumonia, chest, organa); model (resnet18, resnet50); size (28, 224); protocol."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    networks = NETWORKS[int(one_of("size", str(size), tuple(map(str, NETWORKS))))]
    one_of("subset", subset, ("pneumonia", "chest", "organa"))
    archive = subset if study or size == 28 else f"{subset}_{size}"
    color = (0.5,) * (1 if size == 28 else 3)  # torchvision's networks have three input channels
    return Config(
        name=slug("medmnist", subset, one_of("model", model, networks), str(size), "study" if study else ""),
        data=DataConfig(dataset=f"medmnist/{archive}", protocol=protocol),
        input=InputSpec(
            size=(size, size), channels=1, interpolation="nearest" if study else "bilinear", mean=color, std=color
        ),
        model=ModelConfig(name=networks[model], dtype="float32" if study else None),
        optim=OptimConfig(name="adam", lr=1e-3, eps=1e-8, schedule="step", decay_at=(0.5, 0.75)),
        train=TrainConfig(batch_size=128, epochs=100),
    )
