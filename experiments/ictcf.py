"""iCTCF (COVID-negative, COVID-positive and non-informative CT slices): networks trained from random weights, 512 px.

    python -m lungjax.main --experiment=ictcf:model=efficientnetv2_b0
    python -m lungjax.main --experiment=ictcf:model=convnext_base,protocol=study

Study: github.com/kaclewtak/Classifying-CT-Scans-for-COVID-19-Classification. The published test accuracies are .9575,
.9367 and .9460 for EfficientNetV2-B0, B1 and B2; .4310, .9410 and .9596 for ConvNeXt-Tiny, Small and Base; and .9571,
.9299 and .5911 for ResNet50V2, 101 and 152. The study trained for ten epochs of 19,585 slices, each taking 110 s (B0,
RTX 4090) to 1,239 s (ConvNeXt-Base, A100). A run takes days on a CPU, since a slice of 512 px costs 5.2 times as much
as one of 224 px (step times: tests/benchmarks/README.md). This experiment has not been run on the real data set.

| | study | clean |
| --- | --- | --- |
| images | 19,685 and 8,294 rotated copies, generated before the split | originals, rotated and shifted in training |
| balance | 9,979 / 9,000 / 9,000, also in val and test | each class sampled equally often; val, test unmodified |
| splits | by slice | by blocks of neighboring slices |
| ConvNeXt, ResNetV2 | input 0..255 | input -1..1, as EfficientNetV2 |
| weights tested | last of 10 epochs | best AUC on val of at most 20 epochs, patience 5 |
| computation on GPU, TPU | float32 | bfloat16 |

The study lists EfficientNetV2-B3, S, M and L as future work; we chose their batch sizes. Both protocols read the stage
`features`, the study's local threshold and morphology; `--set=data.dataset=ictcf` uses the original slices.

Caveats: no test score is reliable. Copies of a slice and its neighbors are in several splits. About 56 % of the pCT and
37 % of the niCT test images are generated. The last epoch was tested although validation fluctuated: ConvNeXt-Tiny (at
best .93 on val) and ResNet152V2 (.84) would rank differently. Published confusion matrices come from rounded
probabilities. "Early stopping" with patience 10 never triggers in 10 epochs.

Not reproducible: the draw of copies was unseeded, and Keras's AdamW also decays norms and biases.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

BATCHES = {  # derived from the steps of the published logs; ours for the networks that the study did not train
    "efficientnetv2_b0": 32, "efficientnetv2_b1": 32, "efficientnetv2_b2": 64,
    "efficientnetv2_b3": 32, "efficientnetv2_s": 16, "efficientnetv2_m": 8, "efficientnetv2_l": 8,
    "convnext_tiny": 32, "convnext_small": 16, "convnext_base": 12,
    "resnet50v2": 16, "resnet101v2": 16, "resnet152v2": 14,
}  # fmt: skip


def get_config(model: str = "efficientnetv2_b0", weights: str = "none", protocol: str = "clean") -> Config:
    """Arguments: model; weights (none as in the study, or imagenet with its own input range); protocol."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    one_of("model", model, BATCHES)
    one_of("weights", weights, ("none",) if study else ("none", "imagenet"))
    resnet, convnext = model.startswith("resnet"), model.startswith("convnext")
    half = (128 / 255,)  # pixel / 128 - 1
    # Keras's ConvNeXt has no normalization for one channel, and its ResNetV2 never has one.
    raw = study and (resnet or convnext)
    mean, std = ((0.0,), (1 / 255,)) if raw else (half, half)
    # Without its top, Keras's ConvNeXt ends in a norm before the pool. Pretrained weights have their own norm.
    top = HeadConfig(norm_before_pool="layer" if convnext else None, norm_after_pool="batch", dropout=0.2)
    head = top if weights == "none" else HeadConfig(dropout=0.2)
    return Config(
        name=slug("ictcf", model, weights if weights != "none" else "", "study" if study else ""),
        data=DataConfig(
            dataset="ictcf/oversampled-features" if study else "ictcf/features",
            protocol=protocol,
            sampling="natural" if study else "balanced",
        ),
        input=InputSpec(
            size=(512, 512),
            channels=1,
            interpolation="bicubic",  # by PIL; only larger slices are resized
            mean=mean if weights == "none" else None,
            std=std if weights == "none" else None,
        ),
        augment=preset("none" if study else "ictcf"),
        model=ModelConfig(
            name=model,
            weights=weights,
            drop_path=0.0 if convnext else None,
            dtype="float32" if study else None,
            head=head,
        ),
        optim=OptimConfig(name="adamw", lr=0.01, weight_decay=1e-3) if resnet else OptimConfig(name="adam", lr=1e-3),
        train=TrainConfig(
            batch_size=BATCHES[model],
            epochs=10 if study else 20,
            patience=0 if study else 5,
            keep="last" if study else "best",
        ),
    )
