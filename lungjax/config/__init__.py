"""Frozen dataclasses for the configuration of a run and the metadata of a trained model. Nothing here imports jax."""

from lungjax.config.schema import (
    AUTO,
    CROPS,
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
