"""The settings: what there is, how values are read, and where they come from."""
