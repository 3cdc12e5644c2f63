"""Enables the TPU compiler on a machine without TPUs, before jax is imported."""

from lungjax.runtime import environment

environment.without_tpu()
