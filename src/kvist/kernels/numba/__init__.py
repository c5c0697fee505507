"""On CPUs: compiled loops over packed bytes."""
