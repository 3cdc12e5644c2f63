"""Pretrained against random, by size of the network: the comparison of "Transfusion" (arXiv 1902.07208).

    python -m lungjax.prepare --dataset=folder/xray --source=DIR
    python -m lungjax.main --experiment=transfusion:model=resnet50,dataset=folder/xray
    python -m lungjax.main --experiment=transfusion:model=resnet50,dataset=folder/xray,start=imagenet
    python -m lungjax.main --experiment=transfusion:model=resnet50,dataset=folder/xray,start=meanvar:imagenet
    python -m lungjax.main --experiment=transfusion:model=cbr_small,dataset=folder/xray,start=run:runs/imagenet_pretrain_cbr_small

Published AUC, random / ImageNet: ResNet-50 .964 / .967, CBR-LargeT .962 / .962 on 250,000 retina photographs; .922 /
.946 and .936 / .939 on 5,000 of them (`--set=train.fraction=0.1` makes such a curve). Those photographs are not public,
so the numbers here are of other data: what can be compared is the difference between the two starts. No ImageNet
weights of the CBR networks are public; `imagenet_pretrain` makes some. `meanvar:` is the paper's "Mean Var": random,
with each tensor's mean and variance. Cost: CBR-LargeT trains on 11 and ResNet-50 on about 7 images of 224 px a second
on 2 cores (tests/benchmarks/README.md).

Adam at 1e-3, as in the paper for the retina; everything is trained, three channels for every start, so that networks
of one name have equal parameters. Epochs, batch and weights tested (best AUC on val) are ours: the paper has other data.

protocol=study takes the splits that a study's data set came with (`data.protocol`), clean (the default) those without
copies and by patient; nothing else differs, and a folder of one's own has no study. The paper's count of CBR-Tiny
(1,076,480) doesn't fit its definition (5x5, 64 to 512: 4,303,360 by the same rule); `cbr_tiny` follows the definition.
"""  # noqa: E501 a command

from lungjax.config import PROTOCOLS, Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, slug

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; three numbers make three channels


def get_config(
    model: str = "cbr_small", start: str = "random", dataset: str = "folder", protocol: str = "clean"
) -> Config:
    """Arguments: model, any; start: random, imagenet, run:DIR, meanvar: and one of these; dataset; protocol."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    if not start.startswith(("run:", "meanvar:", "file:")):
        one_of("start", start, ("random", "imagenet", "run:DIR", "meanvar:imagenet", "meanvar:run:DIR", "file:PATH"))
    alone = start == "random"
    return Config(
        name=slug("transfusion", model, start, dataset, "study" if study else ""),
        data=DataConfig(dataset=dataset, protocol=protocol),
        input=InputSpec(size=(224, 224), channels=1, mean=MEAN if alone else None, std=STD if alone else None),
        # The published decay of 0.99 would still hold much of the start's statistics after some hundred steps.
        model=ModelConfig(name=model, weights="none" if alone else start, momentum=0.9),
        optim=OptimConfig(name="adam", lr=1e-3),
        train=TrainConfig(batch_size=32, epochs=10),
    )
