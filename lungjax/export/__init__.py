"""A finished run as a file that needs no lungjax: StableHLO, ONNX, SavedModel, and Triton's folder layout."""
