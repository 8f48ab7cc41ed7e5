"""Commands of ``longmem eval``, one file each."""
