"""Buffers without I/O: validated arguments, errors, chains of views, the buffer that stands by
itself, and readers and writers over whatever gives and takes bytes.

Nothing here knows a socket or an event loop; what waits, waits for something that it was given.
It imports nothing else of anypoll, and everything else may import it.
"""
