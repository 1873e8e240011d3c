"""The server: ``serve()``, listen targets, admission control, connection lifecycles, shutdown.

This wing may import every other, and none of them imports it.
"""
