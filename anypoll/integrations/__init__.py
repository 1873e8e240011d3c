"""Connections for code that was written for other libraries: one module for each, imported only by
those who use it.
"""
