"""Rules that map tensor names in weight files to parameter paths: one module per family, one table per layout."""

import importlib
import importlib.util

from lungjax.models import family_of
from lungjax.weights.convert import Rules


def layouts(model: str) -> dict[str, Rules]:
    """Returns the rules for the family of a network, by layout. Raises ValueError for an unknown network."""
    family = family_of(model)
    if importlib.util.find_spec(f"{__name__}.{family}") is None:
        return {}
    return dict(importlib.import_module(f"{__name__}.{family}").RULES)
