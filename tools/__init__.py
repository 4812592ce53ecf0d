"""What a person runs by hand: `strata NAME`."""
