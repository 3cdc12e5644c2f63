"""Shows what a trained network looked at: the command `python -m lungjax.explain`."""
