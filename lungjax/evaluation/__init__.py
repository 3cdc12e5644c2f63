"""Metrics of predictions with confidence intervals; README.md describes them."""
