"""The process and its machines: set-up of jax, hosts, device mesh, signals, checkpoints and atomic files."""
