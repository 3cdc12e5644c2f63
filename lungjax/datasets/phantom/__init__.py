"""Drawn CT slices with known findings."""
