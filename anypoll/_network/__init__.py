"""Sockets, listening and dialling."""
