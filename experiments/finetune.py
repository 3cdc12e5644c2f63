"""ImageNet weights, fine-tuned on anyone's folder of images: EfficientNet-Lite0 at 160 px.

    python -m lungjax.prepare --dataset=folder --source=DIR
    python -m lungjax.main --experiment=finetune                          # everything is trained
    python -m lungjax.main --experiment=finetune:tune=head                # the classifier alone
    python -m lungjax.main --experiment=finetune:tune=blocks:3            # the last three blocks and the classifier
    python -m lungjax.main --experiment=finetune:model=convnext_tiny      # any network of lungjax.list_models()

The weights bring their own mean and standard deviation. Gray images are repeated to three channels. What this gave
on CT slices and chest X-rays, with and without ImageNet weights: experiments/README.md. 2 cores train Lite0 at 160 px
on about 25 images a second, its head alone on about 100.
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
    """Arguments: dataset as prepared; model; weights; tune, what is trained; size in pixels; lr, 0 for the usual."""
    # Trained weights are moved gently; a new classifier, or a network that starts from nothing, is not.
    usual = 3e-4 if weights != "none" and tune != "head" else 1e-3
    return Config(
        name=f"finetune_{model}",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(size, size), channels=1),
        # The published 0.99 would still hold a quarter of ImageNet's statistics after 135 steps.
        model=ModelConfig(name=model, weights=weights, momentum=0.9),
        optim=OptimConfig(
            name="adamw", lr=lr or usual, schedule="cosine", weight_decay=1e-4, class_weights="balanced", tune=tune
        ),
        train=TrainConfig(batch_size=32, epochs=5),
    )
