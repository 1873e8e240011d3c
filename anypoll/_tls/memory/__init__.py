"""The session that needs nothing but :mod:`ssl`: OpenSSL between two memory BIOs."""
