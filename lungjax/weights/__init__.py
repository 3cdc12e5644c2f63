"""Pretrained weights: catalogue, download, file formats and name rules."""
