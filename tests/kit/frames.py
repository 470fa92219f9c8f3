"""Frames as clients send them."""

from __future__ import annotations

__all__ = ["masked_frame"]


def masked_frame(payload: bytes, first: int = 0x81) -> bytes:
    """Return a frame of at most 65,535 bytes, masked with zeros; `first` is its first byte, by default a whole text."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([first]) + length + bytes(4) + payload
