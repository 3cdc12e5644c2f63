"""Networks compared with references of other libraries, through files in the released formats."""
