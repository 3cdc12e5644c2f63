"""Results tables of the studies, published and ours."""
