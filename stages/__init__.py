"""The pipeline: one module per DVC stage, each read from top to bottom."""

import os

# torch reads it once, at its first allocation: large tensors in huge pages cost far fewer page faults, which are half
# of the time of a merge. Nothing else changes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
