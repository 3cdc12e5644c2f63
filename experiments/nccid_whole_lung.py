"""Whole lung or not: EfficientNet-B1 on mid-coronal CT images from the NCCID, 64 x 128 px.

    python -m lungjax.weights --fetch=efficientnet_b1.keras
    python -m lungjax.main --experiment=nccid_whole_lung
    python -m lungjax.main --experiment=nccid_whole_lung:protocol=study

Study: github.com/nhsx/nccid-ct-slice-lung-classification. The published scores on 716 test images are accuracy 0.982,
AUC 0.9958 and the confusion matrix [512, 10; 3, 191]. The study trained for 8 epochs of 9 s each on a GPU; on 2 cores a
run takes about ten minutes, estimated from EfficientNet-B0 (tests/benchmarks/README.md). This experiment has not been
run on the images of the study, which are available on application only.

| | study | clean |
| --- | --- | --- |
| splits | by image, seed 42 | by series |
| weights tested | last epoch | best AUC on val |
| learning rate | minimum after 416 of 424 steps | minimum at the end |
| normalization | that of the study's TensorFlow version | that of the weights |
| computation on GPU, TPU | float32 | bfloat16 |

Caveats: the published test scores are optimistic, because a series (and a patient) may be in several splits. The README
states a dropout of 0.3, but the published run used 0.2. The images are stored rotated by 180 degrees, so prediction
rotates its input as well (`orientation` in model.json). TensorFlow 2.3 to 2.5 divided EfficientNet's input by the
square root of ImageNet's standard deviations (tensorflow issue 49930); the published run used about 2.3. The order of
augmentations differs (`lungjax.config.presets`). Inversion of half of the train images is unusual for CT but intended,
so it is kept; `--set=augment.invert=0` disables it.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

EPOCH = 53  # steps: 3,341 images in batches of 64
ROOTS = (0.229**0.5, 0.224**0.5, 0.225**0.5)


def get_config(protocol: str = "clean") -> Config:
    """Arguments: protocol (clean or study)."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    return Config(
        name=slug("nccid_whole_lung", "study" if study else ""),
        data=DataConfig(dataset="nccid_whole_lung", protocol=protocol),
        input=InputSpec(size=(64, 128), channels=1, std=ROOTS if study else None, antialias=not study),
        augment=preset("nccid"),
        model=ModelConfig(
            name="efficientnet_b1",
            weights="imagenet",
            drop_path=0.2,
            dtype="float32" if study else None,
            head=HeadConfig(dropout=0.2),
        ),
        optim=OptimConfig(
            name="adam",
            lr=1e-4,
            schedule="cosine",
            end_factor=0.3,
            schedule_steps=416 if study else 0,  # 8 x 52: they rounded down; Keras rounds an epoch up
            class_weights="balanced",
        ),
        train=TrainConfig(
            batch_size=64,
            epochs=8,
            steps=8 * EPOCH if study else 0,
            eval_steps=EPOCH if study else 0,
            keep="last" if study else "best",
        ),
    )
