"""Memory that lasts: a durable store of attention keys and values, many namespaces, deletable (see ``MemoryStore``)."""
