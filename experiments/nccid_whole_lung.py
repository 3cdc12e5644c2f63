"""Whole lung or not: EfficientNet-B1 on mid-coronal CT pictures of the NCCID, 64 x 128 px.

    python -m lungjax.prepare --dataset=nccid_whole_lung --source=DIR
    python -m lungjax.weights --fetch=efficientnet_b1.keras
    python -m lungjax.main --experiment=nccid_whole_lung
    python -m lungjax.main --experiment=nccid_whole_lung:protocol=study

Study: github.com/nhsx/nccid-ct-slice-lung-classification. Published, of 716 test pictures: accuracy 0.982, AUC 0.9958,
confusion [512, 10; 3, 191]. Cost there: 8 epochs of 9 s on a GPU; on 2 cores about ten minutes, by the measured steps
of EfficientNet-B0 (tests/benchmarks/README.md). The pictures are given out on application only; we have none, and
have not run this on them.

| | study | clean |
| --- | --- | --- |
| splits | by picture, seed 42 | by series |
| weights tested | last epoch | best AUC on val |
| learning rate | on its floor after 416 of 424 steps | on its floor at the end |
| normalisation | that of their TensorFlow | that of the weights |

Not to be trusted: the published test scores, as a series (and a patient) may be on both sides of the split. The README
says dropout 0.3, the published run has 0.2. TensorFlow 2.3 to 2.5 divided EfficientNet's images by the square root of
ImageNet's standard deviations (tensorflow issue 49930); the run had about 2.3. The order in which pictures are
changed differs: `lungjax.config.presets`. Inversion (half of the train pictures) is unusual for CT, but no mistake: it
stays; `--set=augment.invert=0` leaves it out.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

EPOCH = 53  # steps: 3,341 pictures in batches of 64
ROOTS = (0.229**0.5, 0.224**0.5, 0.225**0.5)


def get_config(protocol: str = "clean") -> Config:
    """Arguments: protocol, clean or study."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    return Config(
        name=slug("nccid_whole_lung", "study" if study else ""),
        data=DataConfig(dataset="nccid_whole_lung", protocol=protocol),
        input=InputSpec(size=(64, 128), channels=1, std=ROOTS if study else None, antialias=not study),
        augment=preset("nccid"),
        model=ModelConfig(name="efficientnet_b1", weights="imagenet", drop_path=0.2, head=HeadConfig(dropout=0.2)),
        optim=OptimConfig(
            name="adam",
            lr=1e-4,
            schedule="cosine",
            end_factor=0.3,
            schedule_steps=416 if study else 0,  # 8 x 52, as they rounded down where Keras's epochs round up
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
