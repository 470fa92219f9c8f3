"""What both ends of the control socket share, without I/O: MessagePack-RPC, the socket's path, defaults."""
