"""Pure machines: no sockets, no clock, no asyncio, no randomness of their own."""
