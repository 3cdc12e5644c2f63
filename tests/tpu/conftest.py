"""Before jax is imported: the TPU compiler without TPUs."""

from lungjax.runtime import environment

environment.without_tpu()
