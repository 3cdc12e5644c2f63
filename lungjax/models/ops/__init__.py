"""Convolution, batch norm and pooling in the form that is fast on each platform."""
