"""Results tables of the studies: published numbers and ours."""
