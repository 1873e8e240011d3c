"""Buffers without I/O: arguments, errors, limits, chains of views, readers and writers over anything."""
