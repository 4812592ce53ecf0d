"""All that knows about architectures."""
