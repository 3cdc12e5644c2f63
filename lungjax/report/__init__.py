"""Pages and figures about results and data sets."""
