"""Rule tables: one file a family of networks, one table a layout of names."""

import importlib
import importlib.util

from lungjax.config import nearest
from lungjax.models import family_of
from lungjax.weights.convert import Rules


def layouts(model: str) -> dict[str, Rules]:
    """Returns the rules of a network's family by layout, {} for a family without public weights."""
    family = family_of(model)
    if importlib.util.find_spec(f"{__name__}.{family}") is None:
        return {}
    table: dict[str, Rules] = importlib.import_module(f"{__name__}.{family}").RULES
    return table


def rules_for(model: str, layout: str) -> Rules:
    """Returns the rules that turn a file of `layout` into the network `model`.

    Raises ValueError for an unknown network, or a layout that its family has no rules for.
    """
    known = layouts(model)
    if layout not in known:
        raise ValueError(f"{model}: no rules for weights in the layout {layout!r}; {nearest(layout, known)}")
    return known[layout]
