"""Exports of finished runs, usable without lungjax: StableHLO, ONNX, SavedModel, and Triton's folder layout."""
