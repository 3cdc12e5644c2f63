"""Synthetic CT slices with known findings."""
