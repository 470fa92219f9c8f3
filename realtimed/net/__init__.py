"""Sockets: listening, accepting, sending without waiting. Knows `hub`, `config` and `process`, and no protocol."""
