"""The training loop and the programs that it compiles."""
