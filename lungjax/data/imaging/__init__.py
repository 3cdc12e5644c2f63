"""Image files and scans: decoding, volumes, masks."""
