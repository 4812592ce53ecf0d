"""params.yaml, typed: every key with its description, unit and default."""
