"""The daemon's HTTP endpoint: health and metrics."""
