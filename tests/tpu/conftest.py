"""Before jax is imported: the TPU compiler without TPUs."""

from lungjax import machine

machine.without_tpu()
