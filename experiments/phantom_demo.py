"""Three drawn findings on made-up CT slices: the whole job in minutes, with no data to fetch.

    python -m lungjax.main --experiment=phantom_demo

Normal, Pneumonia and COVID-19 phantoms (`lungjax.data.phantom`), a small CNN, 2 cores: about two minutes.
"""

from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig


def get_config(model: str = "cbr_tiny", dataset: str = "phantom_ct") -> Config:
    """Arguments: model; dataset, phantom_ct or its tiny version phantom_ct/tiny."""
    return Config(
        name="phantom_demo",
        data=DataConfig(dataset=dataset),
        input=InputSpec(size=(96, 96), channels=1),
        model=ModelConfig(name=model),
        optim=OptimConfig(name="adam", lr=1e-3, schedule="cosine"),
        train=TrainConfig(batch_size=32, epochs=8),
    )
