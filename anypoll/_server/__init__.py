"""The server: ``serve()``, what it listens on, whom it lets in, the life of each connection from
the first hook to the last close callback, and the graceful end.

It may import every other wing, and none of them imports it.
"""
