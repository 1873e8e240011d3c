"""One connection: lifecycle, input, output, request mode, UNIX sockets, AnyIO's stream classes.

This wing imports ``_loop``, ``_epoll`` and ``_buffers``. TLS, the network and the server build on
it.
"""
