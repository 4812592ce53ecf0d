"""The training of one stage."""
