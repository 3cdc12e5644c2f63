"""EfficientNetV2-S from ImageNet weights on COVIDx CT 3A, cropped to the body, with COVIDNet-CT's augmentation.

    python -m lungjax.main --experiment=effnetv2_covidxct

The data set (Kaggle hgunraj/covidxct) has 425,024 slices from 5,312 patients. The network is from arXiv 2104.00298.
Download its weights once (`python -m lungjax.weights --fetch=efficientnetv2_s.keras`, 88 MB); they define the input
range, x / 128 - 1. `weights=none` starts from random weights, and `weights=run:WORKDIR` from those of another run.

Classes are sampled equally often, and slices are augmented as in COVIDNet-CT (`lungjax.config.presets`). An epoch of
357,518 slices takes hours on a GPU, so validation runs every 2,000 steps, as in COVID-Net CT. No result of this network
on this data set is published. This experiment has not been run on the real data set, to which we have no access.

`protocol=study` (2a, 3a) trains and tests as the transfer study of `covidx_ct` did, for comparison with its table. It
uses the study's train and val slices, which were balanced once by drawing with replacement, tests the last weights, and
computes in float32. `clean`, the default, uses all slices of the official split and tests the weights with the best AUC
on val.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug


def get_config(
    version: str = "3a", model: str = "efficientnetv2_s", weights: str = "imagenet", protocol: str = "clean"
) -> Config:
    """Arguments: version of COVIDx CT (1, 2a, 2b, 3a, 3b; study: 2a, 3a); model; weights; protocol (clean or study)."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    one_of("version", version, ("2a", "3a") if study else ("1", "2a", "2b", "3a", "3b"))
    return Config(
        name=slug("effnetv2_covidxct", version, model, weights, "study" if study else ""),
        data=DataConfig(dataset=f"covidx_ct/{version}", protocol=protocol, sampling="natural" if study else "balanced"),
        input=InputSpec(size=(224, 224), channels=1, crop="box", box_margin=0.1),  # the margin allows for box jitter
        augment=preset("covidnet_ct"),
        model=ModelConfig(name=model, weights=weights, dtype="float32" if study else None),
        optim=OptimConfig(name="adamw", lr=1e-3, schedule="cosine", warmup_steps=1000, weight_decay=1e-5),
        train=TrainConfig(
            batch_size=64, epochs=5, eval_steps=2000, patience=0 if study else 10, keep="last" if study else "best"
        ),
    )
