"""The commands `realtimed` and `realtimectl`: the only users of typer."""
