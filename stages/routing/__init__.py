"""The routed model: every stage's change beside the base, and a router that chooses one for each prompt."""
