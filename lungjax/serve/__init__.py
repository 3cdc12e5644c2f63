"""The HTTP service around a trained network: `python -m lungjax.serve` (`serve` extra)."""
