"""The settings: which there are, how their values are read, and where the values come from."""
