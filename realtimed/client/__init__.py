"""The Python clients of the control socket. They know `rpc`, `errors`, `text` and `hub.position`."""
