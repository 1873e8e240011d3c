"""TLS over a connection."""
