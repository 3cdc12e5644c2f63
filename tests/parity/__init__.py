"""Compares networks with those of other libraries, through files in the released formats."""
