"""One event loop and its pollers."""
