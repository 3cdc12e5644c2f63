"""Pretrained and random initialization for networks of different sizes, as in "Transfusion" (arXiv 1902.07208).

    python -m lungjax.main --experiment=transfusion:model=resnet50,dataset=folder/xray
    python -m lungjax.main --experiment=transfusion:model=resnet50,dataset=folder/xray,start=imagenet
    python -m lungjax.main --experiment=transfusion:model=resnet50,dataset=folder/xray,start=meanvar:imagenet
    python -m lungjax.main --experiment=transfusion:model=densenet121,dataset=folder/xray,start=xrv
    python -m lungjax.main --experiment=transfusion:model=cbr_small,dataset=folder/xray,start=run:runs/imagenet_pretrain_cbr_small

On 250,000 retina photographs, the published AUC with random / ImageNet weights is .964 / .967 for ResNet-50 and .962 /
.962 for CBR-LargeT; on 5,000 of them, it is .922 / .946 and .936 / .939. (`--set=train.fraction=0.1` trains on a tenth
of the patients.) These photographs are not public, so the experiment uses other data, and only the difference between
the two initializations is comparable. No ImageNet weights of the CBR networks are public; `imagenet_pretrain` trains
them. `meanvar:` is the paper's "Mean Var", random weights with the mean and variance of each pretrained tensor. On 2
cores, CBR-LargeT trains on 11 and ResNet-50 on about 7 images of 224 px per second (tests/benchmarks/README.md).

As in the paper's experiments on the retina, the optimizer is Adam with learning rate 1e-3. All layers are trained, and
the input has three channels with every initialization, so the number of parameters is the same; only torchxrayvision's
weights (start=xrv) have one. start=radimagenet are RadImageNet's. Epochs, batch size and the tested weights (best AUC on
val) are our choice, since the paper uses other data.

protocol=study uses the original splits of a data set (`data.protocol`); clean, the default, splits by patient without
duplicates. Nothing else differs, and a user's folder has no study splits. The paper's parameter count for CBR-Tiny
(1,076,480) does not match its definition, which gives 4,303,360 (5x5 kernels, 64 to 512 channels); `cbr_tiny` follows
the definition.
"""  # noqa: E501 a command

from lungjax.config import PROTOCOLS, Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, slug

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; three numbers select three channels


def get_config(
    model: str = "cbr_small", start: str = "random", dataset: str = "folder", protocol: str = "clean"
) -> Config:
    """Arguments: model; start (random, weights, run:DIR, or meanvar: with one of these); dataset; protocol."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    if not start.startswith(("run:", "meanvar:", "file:")):
        sources = ("random", "imagenet", "xrv", "radimagenet")
        one_of("start", start, (*sources, "run:DIR", "meanvar:imagenet", "meanvar:run:DIR", "file:PATH"))
    random = start == "random"
    return Config(
        name=slug("transfusion", model, start, dataset, "study" if study else ""),
        data=DataConfig(dataset=dataset, protocol=protocol),
        input=InputSpec(size=(224, 224), channels=1, mean=MEAN if random else None, std=STD if random else None),
        # With the published decay of 0.99, much of the initial statistics would remain after some hundred steps.
        model=ModelConfig(name=model, weights="none" if random else start, momentum=0.9),
        optim=OptimConfig(name="adam", lr=1e-3),
        train=TrainConfig(batch_size=32, epochs=10),
    )
