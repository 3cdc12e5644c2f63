"""Trains any network from random weights on your ImageNet folder, to provide other runs with pretrained weights.

    python -m lungjax.prepare --dataset=folder/imagenet --source=ILSVRC2012    # train/, val/ with one folder per class
    python -m lungjax.main --experiment=imagenet_pretrain:model=cbr_small
    python -m lungjax.main --experiment=finetune:model=cbr_small,weights=run:runs/imagenet_pretrain_cbr_small

This is for networks without published ImageNet weights, such as the CBR family of "Transfusion" (arXiv 1902.07208),
whose authors did not publish the pretrained weights. `dataset=` selects another prepared data set. 90 epochs of 1.28
million images need an accelerator; CBR-Small takes some hours on one GPU. This experiment has not been run on ImageNet,
to which we have no access.
"""

from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig


def get_config(model: str = "cbr_small", dataset: str = "folder/imagenet", size: int = 224) -> Config:
    """Arguments: model; dataset (as prepared); size of the images in pixels."""
    return Config(
        name=f"imagenet_pretrain_{model}",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(size, size), channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        model=ModelConfig(name=model),
        optim=OptimConfig(
            name="sgd",
            lr=0.1,
            nesterov=True,
            schedule="cosine",
            warmup_steps=2000,
            weight_decay=5e-5,
            label_smoothing=0.1,
        ),
        train=TrainConfig(batch_size=256, epochs=90, monitor="slice.accuracy"),
    )
