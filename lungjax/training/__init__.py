"""The training loop and what it compiles."""
