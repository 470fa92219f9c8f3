"""MessagePack-RPC, the language of the control socket, without I/O. It knows nothing else of realtimed."""
