"""Numbers and data sets to pages and figures."""
