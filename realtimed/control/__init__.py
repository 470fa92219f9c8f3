"""The control socket: MessagePack-RPC on a Unix socket, the publishers' side of realtimed."""
