"""What is in a prepared data set, as a page with pictures: `python -m lungjax.explore`."""
