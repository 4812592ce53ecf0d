"""Checkpoints as lazily computed tensors, and the single-file writer."""
