"""Numbers about running models."""
