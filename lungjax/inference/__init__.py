"""A trained model applied to files and scans; the Python API."""
