"""Buffers without I/O: view chains, ``LinkBuffer``, readers, writers, argument checks, errors.

Nothing here knows of sockets or event loops; code that waits, waits on an object passed to it.
This wing imports nothing else from anypoll, and everything else may import it.
"""
