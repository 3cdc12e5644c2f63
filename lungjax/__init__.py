"""lungjax: lung CT slices and chest X-rays, classified in JAX."""

__version__ = "0.1.0"
