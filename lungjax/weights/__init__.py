"""ImageNet weights: where they are, how files are read, how their names become ours."""
