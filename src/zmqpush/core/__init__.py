"""The sans-I/O core: bytes in, bytes out; no sockets, files, clocks or event loops."""
