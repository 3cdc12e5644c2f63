"""A run, an experiment and a trained model as frozen dataclasses. Nothing here imports jax."""

from lungjax.config.schema import (
    CROPS,
    DTYPES,
    EXPLANATIONS,
    INTERPOLATIONS,
    PROTOCOLS,
    STAGES,
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    HeadConfig,
    InputSpec,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    fields_of,
    nearest,
)
from lungjax.config.validate import check
