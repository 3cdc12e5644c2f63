"""CT-COV19 (COVID-19, normal, other pneumonia): the study's 8 networks, 5 image versions and 4 training variants.

    python -m lungjax.main --experiment=ct_cov19:model=cbr_tiny
    python -m lungjax.main --experiment=ct_cov19:model=cbr_largew,class_weight=true,protocol=study
    python -m lungjax.main --experiment=ct_cov19:model=efficientnet_b3,weights=none,images=lungs,augment=true

Study: github.com/marta-0/covid-ct (160 runs; data github.com/m2dgithub/CT-COV19). The published weighted F1 (val /
test) of the configuration that was best on val is .810 / .582 for Simple, .861 / .580 for Tiny, .860 / .600 for Small,
.853 / .634 for LargeW, .888 / .577 for LargeT, .766 / .711 for BiT, and .768 / .629 (ImageNet weights) or .761 / .570
(random weights) for EfficientNet-B3. This experiment has not been run on the real data set, to which we have no access.
Since its 4,404 train slices of 512 px have five times the pixels of 224 px slices, train Simple and the frozen networks
on a CPU and the others on a GPU (step times: tests/benchmarks/README.md).

| | study | clean |
| --- | --- | --- |
| splits | original; they divide blocks of neighboring slices | by scan or run of slices, no near duplicates |
| nobackg, crop, lungs | the study's contours and snake | lungjax's masks |
| weights tested | best weighted F1 on val | best macro F1 on val |
| resizing | bilinear without antialiasing | with antialiasing |
| EfficientNet's normalization | TensorFlow 2.5's, presumably theirs (issue 49930) | that of the weights |
| computation on GPU, TPU | float32 | bfloat16 |

Caveats: F1 on val is optimistic (0.06 to 0.31 above test), because val selected the epoch and the configuration.
LargeT and Tiny are the same network in the study's code (`cbr_larget_study`; `cbr_larget` is the paper's, never trained
there). Micro AUC was computed from unnormalized logits. Only the class COV has JPEG files, which affects all scores.

Not reproducible: epochs and batch size are not documented (here 30 and 32), some lung masks were corrected by hand,
and the ranges of BiT's augmentation are not given (here those of the others). The study's negative zoom was symmetric,
as it is here. The study's BiT module took pixels x in 0..1 and rescaled them internally; the public weights used here
take 2x - 1 instead.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

# Allowed initial weights of each network; the first is the default.
FAMILIES = {
    **dict.fromkeys(("simple", "cbr_tiny", "cbr_small", "cbr_largew", "cbr_larget", "cbr_larget_study"), ("none",)),
    "bit_r50x1": ("imagenet",),
    **dict.fromkeys(("efficientnet_b0", "efficientnet_b3", "efficientnet_b7"), ("imagenet", "none")),
}
SIZES = {  # height, width of the network input
    "original": (512, 512), "nobackg": (512, 512), "crop": (328, 512), "lungs_nocrop": (512, 512), "lungs": (256, 330),
}  # fmt: skip


def get_config(
    model: str = "simple",
    images: str = "original",
    class_weight: bool = False,
    augment: bool = False,
    weights: str = "",
    protocol: str = "clean",
) -> Config:
    """Arguments: model; images (stage); class_weight; augment; weights (imagenet, none); protocol (clean, study)."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    size = SIZES[one_of("images", images, SIZES)]
    allowed = FAMILIES[one_of("model", model, FAMILIES)]
    weights = one_of(f"model={model}, weights", weights or allowed[0], allowed)
    efficientnet, frozen = model.startswith("efficientnet"), weights == "imagenet"
    # Small networks divide by 255, as an EfficientNet with random weights does, in three channels.
    mean, std = (None, None) if frozen else ((0.0,), (1.0,))
    if study and efficientnet and frozen:
        std = tuple(v**0.5 for v in (0.229, 0.224, 0.225))
    stage = "" if images == "original" else f"/{'study_' if study else ''}{images}"
    options = ("classw" if class_weight else "", "dataaug" if augment else "", "study" if study else "")
    return Config(
        name=slug("ct_cov19", model, weights if efficientnet else "", images, *options),
        data=DataConfig(dataset=f"ct_cov19{stage}", protocol=protocol),
        input=InputSpec(
            size=size, channels=3 if efficientnet and not frozen else 1, mean=mean, std=std, antialias=not study
        ),
        augment=preset(f"ct_cov19_{images}" if augment else "none"),
        # ImageNet weights: a plain classifier on frozen features; random weights: Keras's top.
        model=ModelConfig(
            name=model,
            weights=weights,
            dtype="float32" if study else None,
            head=HeadConfig(dropout=0.0) if frozen else HeadConfig(),
        ),
        optim=OptimConfig(
            name="adam", lr=1e-3, class_weights="balanced" if class_weight else "none", tune="head" if frozen else "all"
        ),
        train=TrainConfig(
            batch_size=32,
            epochs=30,
            monitor="slice.f1_weighted" if study else "slice.f1_macro",
            patience=0 if study else 10,
        ),
    )
