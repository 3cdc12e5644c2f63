"""Exports of finished runs that need no lungjax: StableHLO, ONNX, SavedModel, and Triton's folder layout."""
