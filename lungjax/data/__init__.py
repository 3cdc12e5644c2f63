"""From image files and scans to batches: decoding, masks, splits, leakage checks, augmentation."""
