"""Transfer learning on COVIDx CT: torchvision's ImageNet VGG, ResNet and DenseNet with only the last layers trained.

    python -m lungjax.main --experiment=covidx_ct
    python -m lungjax.main --experiment=covidx_ct:protocol=study
    python -m lungjax.main --experiment=covidx_ct:model=densenet161,version=2a,protocol=study

Study: github.com/AbdullahMakhdoom/COVIDNet-CT-Identification. For DenseNet-201 with k = 4 on 3A, the published test
accuracy is .8696 (.8811 in a second run), macro F1 .8752, and the best validation accuracy .8956. For DenseNet-161 on
2A only a validation accuracy, .9530, is published. The study trained for 10 epochs of 80,910 slices, 7 minutes each on
a GPU. On 2 cores an epoch takes several hours (in tests/benchmarks/README.md, training all of DenseNet-121 takes 0.2 s
per slice). This experiment has not been run on the real data set, to which we have no access.

| | study | clean |
| --- | --- | --- |
| train | Normal and COVID drawn once with replacement, down to the count of Pneumonia | all, each class equally often |
| val | balanced by repeating slices | unmodified |
| input | the central 340 x 380 pixels, regardless of the image size | the body box |
| flips | vertical and horizontal | horizontal |
| unfreeze=k | torchvision's children 0, -1, ..., 1-k: the first block, then the last ones; VGG: k - 1 convolutions | the last k blocks, and the norm after them |
| weights tested | last epoch (the "best" ones were overwritten) | best macro F1 on val |
| computation on GPU, TPU | float32 | bfloat16 |

Caveats: val and test scores are not comparable, as val repeats slices and has different class frequencies. Differences
of less than one point between single runs are not meaningful. The README's "last three layers" is inaccurate, and its
confusion matrices are transposed. Most COVID slices in train come from sources that are missing in test.

Not reproducible: val and test were normalized with the statistics of test (here with those of train), and the standard
deviation of 3A is not printed (here that of 2A is used). Small images were padded to the window's size; here the window
is clipped to them. The complete image was rotated before the crop; here the window and a margin are rotated after
resizing to a square.
"""  # noqa: E501 a table row

from dataclasses import replace

from lungjax.config import PROTOCOLS, Config, DataConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
from lungjax.config.presets import one_of, preset, slug

# The network here (torchvision's ResNet has its strides on the 3x3) and the number of blocks in its last stage.
MODELS = {
    "vgg16": ("vgg16", 3), "vgg19": ("vgg19", 4),
    "resnet50": ("resnet50_v15", 3), "resnet101": ("resnet101_v15", 3), "resnet152": ("resnet152_v15", 3),
    "densenet121": ("densenet121", 16), "densenet161": ("densenet161", 24), "densenet201": ("densenet201", 32),
}  # fmt: skip
PNEUMONIA = {"1": 22061, "2a": 25496, "2b": 25496, "3a": 26970, "3b": 26970}  # slices of train


def trained_blocks(model: str, unfreeze: int) -> list[int]:
    """Returns the numbers of the blocks of the last stage that the study trained."""
    count = MODELS[model][1]
    if model.startswith("vgg"):  # entries -1, -3, -5, -7 of its features; -1 is a pool
        return list(range(count, count - unfreeze + 1, -1))
    return sorted({1 if i == 0 else count - i + 1 for i in range(unfreeze)})


def get_config(model: str = "densenet201", unfreeze: int = 4, version: str = "3a", protocol: str = "clean") -> Config:
    """Arguments: model; unfreeze (0 to 4); version of COVIDx CT (study: 2a or 3a); protocol (clean or study)."""
    study = one_of("protocol", protocol, PROTOCOLS) == "study"
    one_of("version", version, ("2a", "3a") if study else PNEUMONIA)
    epoch = 3 * PNEUMONIA[version]  # slices: each class as often as Pneumonia
    name, family = MODELS[one_of("model", model, MODELS)][0], model.rstrip("0123456789")
    one_of("unfreeze", str(unfreeze), "01234")
    blocks, stage = trained_blocks(model, unfreeze), 5 if family == "vgg" else 4
    trained = f"|stage{stage}_block({'|'.join(map(str, blocks))})/" if blocks else ""
    tune = f"blocks:{unfreeze}" if unfreeze else "head"
    frozen = OptimConfig(tune="all", freeze=f"^(?!head/{trained})") if study else OptimConfig(tune=tune)
    epochs = 3 if study and version == "2a" else 10
    augment = preset("covidx_transfer")
    return Config(
        name=slug("covidx_ct", model, f"k{unfreeze}", version, "study" if study else ""),
        data=DataConfig(dataset=f"covidx_ct/{version}", protocol=protocol, sampling="natural" if study else "balanced"),
        input=InputSpec(
            size=(224, 224),
            channels=1,
            crop="center" if study else "box",
            crop_size=(340, 380) if study else (0, 0),
            box_margin=0.19 if study else 0.0,  # a rotation by 30 degrees then shows no black corners
            mean=(0.65474,) if version.startswith("3") else (0.6349431,),
            std=(0.32605055,),
        ),
        augment=augment if study else replace(augment, flip_vertical=0.0),
        model=ModelConfig(
            name=name,
            weights="torchvision_v1",
            gray="slice",  # the green slice of the first kernel
            momentum=0.9,
            dtype="float32" if study else None,
            head=HeadConfig(hidden_dropout=0.5) if family == "vgg" else HeadConfig(),
        ),
        # Frozen norms use batch statistics in torch's training mode.
        optim=replace(frozen, name="adam", lr=1e-4, eps=1e-8, frozen_batch_norm="update"),
        train=TrainConfig(
            batch_size=64,
            steps=round(epochs * epoch / 64),
            eval_steps=round(epoch / 64),
            monitor="slice.f1_macro",
            keep="last" if study else "best",
        ),
    )
