"""Facts in words and pictures."""
