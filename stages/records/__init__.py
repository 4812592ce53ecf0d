"""What a training example is, where it comes from, and how it becomes tokens."""
