"""WebSockets: handshake, frames, sessions and the protocols that are spoken over them."""
