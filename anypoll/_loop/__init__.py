"""The runtime below connections: poller pool, event loop hubs, worker tasks, close callbacks.

A hub wakes tasks, on asyncio or on Trio. The runtime decides which hub and which pool a task uses,
and what happens at a fork and at exit.

``_core`` is the compiled core, which only ``anypoll/_epoll.py`` imports. The files here import
``_epoll`` and ``_buffers``; every wing above may import them.
"""
