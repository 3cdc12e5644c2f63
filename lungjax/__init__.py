"""lungjax: lung CT slices and chest X-rays, classified in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["create", "list_models", "load", "open_model", "preprocess"]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that the commands read their flags before jax is imported.
    if name in __all__:
        from lungjax.inference import api, predictor

        return getattr(predictor if name == "open_model" else api, name)
    raise AttributeError(f"module 'lungjax' has no attribute {name!r}")
