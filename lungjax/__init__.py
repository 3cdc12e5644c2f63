"""lungjax: classification of lung CT slices and chest X-rays in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["create", "list_models", "load", "preprocess"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so commands can parse their flags before they import jax.
    if name in __all__:
        from lungjax.inference import api, model

        return getattr(model if name == "load" else api, name)
    raise AttributeError(f"module 'lungjax' has no attribute {name!r}")
