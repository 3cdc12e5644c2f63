"""The process and its machines: setup of jax, hosts, device mesh, signals, checkpoints and atomic files."""
