"""Saliency maps of trained networks: the command `python -m lungjax.explain`."""
