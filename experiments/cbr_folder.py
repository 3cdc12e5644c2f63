"""CBR-Small (arXiv 1902.07208) on a user's folder of images, 128 px, gray.

    python -m lungjax.main --experiment=cbr_folder

The images are CT slices or chest X-rays of any number of classes. Two cores train on about 40 images per second. With
the published "valid" padding, the last feature map at 128 px is a single cell. Heat maps explain that of stage 3, 9 x 9
cells; the last map has as many with input.size=256.
"""

from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig


def get_config(dataset: str = "folder", model: str = "cbr_small", weights: str = "none") -> Config:
    """Arguments: dataset (as prepared, folder or folder/NAME); model; weights."""
    return Config(
        name="cbr_folder",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(128, 128), channels=1),
        model=ModelConfig(name=model, weights=weights),
        optim=OptimConfig(name="adam", lr=1e-3, schedule="cosine", class_weights="balanced"),
        train=TrainConfig(batch_size=32, epochs=8),
    )
