"""EfficientNetV2-S on COVIDx CT 3A: body box, 224 px, classes drawn equally often.

    python -m lungjax.prepare --dataset=covidx_ct/3a --source=DIR
    python -m lungjax.main --experiment=effnetv2_covidxct

Data: Kaggle hgunraj/covidxct, 425,024 slices of 5,312 patients. EfficientNetV2: arXiv 2104.00298. The random
start stands until ported ImageNet weights are there; `--set=model.weights=run:WORKDIR` starts from any run.
An epoch of 357,518 slices takes hours on a GPU, so validation comes every 2,000 steps, as COVID-Net CT's does.
"""

from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig


def get_config(version: str = "3a", model: str = "efficientnetv2_s") -> Config:
    """Arguments: version of COVIDx CT (1, 2a, 2b, 3a, 3b); model."""
    return Config(
        name="effnetv2_covidxct",
        data=DataConfig(dataset=f"covidx_ct/{version}", sampling="balanced"),
        # x / 128 - 1, the input of the EfficientNetV2 weights.
        input=InputSpec(size=(224, 224), channels=3, crop="box", mean=(128 / 255,), std=(128 / 255,)),
        model=ModelConfig(name=model),
        optim=OptimConfig(name="adamw", lr=1e-3, schedule="cosine", warmup_steps=1000, weight_decay=1e-5),
        train=TrainConfig(batch_size=64, epochs=5, eval_steps=2000, patience=10),
    )
