"""The studies' results tables: what was published, what lungjax gets, and the runs between them."""
