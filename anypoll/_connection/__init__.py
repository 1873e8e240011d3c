"""One connection: its fields and errors, its input and its output, opening and closing, request
mode, UNIX sockets, its socket as users see it, and the classes that are AnyIO's streams.

It imports ``_loop``, ``_epoll`` and ``_buffers``. TLS, the network and the server are built on
it.
"""
