"""The daemon's HTTP endpoint, with health and metrics."""
