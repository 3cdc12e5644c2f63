"""Our networks beside the references, weights going through files in the released formats."""
