"""The HTTP service around a trained network: `python -m lungjax.serve` (extra `serve`)."""
