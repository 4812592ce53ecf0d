"""Merge methods: mergekit's kernels, and in time ours registered beside them."""
