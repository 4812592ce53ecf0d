"""The pipeline: one module per DVC stage, each read from top to bottom."""
