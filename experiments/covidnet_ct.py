"""The official COVID-Net CT protocol on COVIDx CT for any network: body box, size, augmentation and metrics.

    python -m lungjax.main --experiment=covidnet_ct:version=2a
    python -m lungjax.main --experiment=covidnet_ct:model=resnet50,version=2a,weights=imagenet,protocol=study

Source: github.com/haydengunraj/COVIDNet-CT (arXiv 2009.05383, 2101.07433). The published accuracy / COVID sensitivity
of the authors' networks is .991 / .973 for CT-1 L, .985 / .947 for CT-1 S, .981 / .962 for CT-2 L and .979 / .957 for
CT-2 S. These networks exist only as TensorFlow 1 graphs and are not included. The README labels the CT-2 scores "3A",
but the confusion matrices are for the 25,658 test slices of 2A; no 3A score is published.

This experiment uses the defaults of their training script: batch 8, SGD with momentum 0.9, learning rate 1e-3 with
cosine decay to 1 %, 20 epochs in which each class is repeated until all are about equally large, and validation every
2,000 steps. The 577,000 steps on 2A or 2.2 million on 3A take weeks on a GPU; `--set=train.steps=50000` shortens the
run and the schedule. Their committed script does not run, and the recipe of the published networks is uncertain (for
CT-1 perhaps 5e-3 and 17 epochs). This experiment has not been run on the real data set.

| | study | clean |
| --- | --- | --- |
| weights tested | last step | best macro F1 on val, patience 20 validations |
| resizing | without antialiasing (OpenCV) | with antialiasing |

Their script trains in mixed precision; on GPU and TPU, both protocols compute in bfloat16.
Both use the official split by patient, which is `data.protocol=study` of versions 1, 2b and 3b. For 2a and 3a, `study`
is the resampling of another study (covidx_ct.py), so these use `clean`, which removes the duplicates that `prepare`
reports. Their order of augmentations and their Otsu threshold differ slightly from ours (`lungjax.config.presets`).

Caveats: slices were selected by an earlier network for most of train and by experts for val and test. STOIC, iCTCF and
Stony Brook are only in train. The scores therefore say little about other hospitals.
"""

from lungjax.config import PROTOCOLS, Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

BATCH, EPOCHS = 8, 20
SLICES = {  # of train: Normal, Pneumonia, COVID-19
    "1": (27201, 22061, 12520), "2a": (35996, 25496, 82286), "2b": (35996, 25496, 88467),
    "3a": (35996, 26970, 294552), "3b": (35996, 26970, 300733),
}  # fmt: skip


def get_config(
    model: str = "efficientnet_b0", version: str = "2a", weights: str = "none", protocol: str = "clean"
) -> Config:
    """Arguments: model (any); version of COVIDx CT; weights; protocol (clean or study)."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    slices = SLICES[one_of("version", version, SLICES)]
    # Their epoch: each class repeated an integer number of times, to about the size of the largest.
    epoch = sum(count * round(max(slices) / count) for count in slices)
    return Config(
        name=slug("covidnet_ct", version, model, weights, "study" if study else ""),
        data=DataConfig(
            dataset=f"covidx_ct/{version}",
            protocol="study" if study and version in ("1", "2b", "3b") else "clean",
            sampling="balanced",
        ),
        input=InputSpec(size=(512, 512), channels=1, crop="box", box_margin=0.1, antialias=not study),
        augment=preset("covidnet_ct"),
        model=ModelConfig(name=model, weights=weights),
        optim=OptimConfig(name="sgd", lr=1e-3, momentum=0.9, schedule="cosine", end_factor=0.01),
        train=TrainConfig(
            batch_size=BATCH,
            steps=round(EPOCHS * epoch / BATCH),
            eval_steps=2000,
            monitor="slice.f1_macro",
            patience=0 if study else 20,
            keep="last" if study else "best",
        ),
    )
