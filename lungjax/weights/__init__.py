"""Pretrained weights: catalogue, download, file formats, name rules."""
