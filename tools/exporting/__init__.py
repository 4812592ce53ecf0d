"""What `strata export` writes, each kind a module of that name."""
