"""The demo: every part of the product once, on the source files of Python's own standard library."""
