"""What docs/ tells of the code, made from the code."""
