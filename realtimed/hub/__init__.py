"""Channels, their subscribers and what is published: pure, without trio, sockets or a clock of its own."""
