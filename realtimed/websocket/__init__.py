"""WebSockets: handshake, frames, sessions, and the protocols spoken over them."""
