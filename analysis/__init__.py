"""What the training did to the model: deltas, what is left of them in the merged file, and the report."""
