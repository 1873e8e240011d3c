"""Adapters for other networking libraries, one module each, imported only by their users."""
