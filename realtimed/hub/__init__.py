"""Channels, their subscribers and what is published: pure, without I/O, tasks or a clock of its own.

Subscribers carry the descriptors that `net` may send to; nothing here touches them.
"""
