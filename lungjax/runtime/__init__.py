"""The process and its machines: jax set-up, hosts, device mesh, signals, checkpoints, atomic files."""
