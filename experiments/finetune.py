"""Fine-tunes ImageNet weights on a user's folder of images: EfficientNet-Lite0 at 160 px.

    python -m lungjax.main --experiment=finetune                          # trains all layers
    python -m lungjax.main --experiment=finetune:tune=head                # only the classifier
    python -m lungjax.main --experiment=finetune:tune=blocks:3            # the last three blocks and the classifier
    python -m lungjax.main --experiment=finetune:model=convnext_tiny      # any network of lungjax.list_models()

The weights define the mean and standard deviation of the input. Grayscale images are repeated across three channels.
At 160 px, two cores train all of Lite0 on about 25 images per second, or its head on about 100. experiments/README.md
has results on CT slices and chest X-rays, with and without ImageNet weights.
"""

from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig


def get_config(
    dataset: str = "folder",
    model: str = "efficientnet_lite0",
    weights: str = "imagenet",
    tune: str = "all",
    size: int = 160,
    lr: float = 0.0,
) -> Config:
    """Arguments: dataset (as prepared); model; weights; tune (trained layers); size in pixels; lr (0: the default)."""
    # A low learning rate for pretrained weights; a higher one for a new classifier or random weights.
    default = 3e-4 if weights != "none" and tune != "head" else 1e-3
    return Config(
        name=f"finetune_{model}",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(size, size), channels=1),
        # With the published 0.99, a quarter of ImageNet's statistics would remain after 135 steps.
        model=ModelConfig(name=model, weights=weights, momentum=0.9),
        optim=OptimConfig(
            name="adamw", lr=lr or default, schedule="cosine", weight_decay=1e-4, class_weights="balanced", tune=tune
        ),
        train=TrainConfig(batch_size=32, epochs=5),
    )
