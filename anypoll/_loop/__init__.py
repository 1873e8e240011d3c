"""One event loop and its pollers: the hub that wakes tasks, on asyncio and on Trio; the pool of
pollers; which of them a task uses, and what happens at a fork and at exit; tasks and callbacks that
the hub runs for connections.

``_core`` is the compiled core. Only ``anypoll/_epoll.py`` imports that; the files here import
``_epoll`` and ``_buffers``, and every wing above may import them.
"""
