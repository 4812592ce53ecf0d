"""Numbers about weights."""
