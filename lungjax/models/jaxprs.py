"""Access to the jaxprs inside an equation, such as those of jit, remat and cond."""

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def inner_jaxprs(equation: Any) -> list[Jaxpr]:
    """Returns the jaxprs among the parameters of an equation."""
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in leaves if isinstance(x, Jaxpr | ClosedJaxpr)]
