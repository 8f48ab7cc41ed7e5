"""The models. To see how the method works, read in this order:

1. ``memory_lm``: ``MemoryLM.forward`` in three steps, run the backbone, read memory, apply the head.
2. ``backbone``: runs the unmodified model and records what its layers were given, and the keys and values to remember.
3. ``longmem``: the SideNet, copied layers beside the backbone; after each, what the backbone changed is added.
4. ``reading``: ``MemoryReader.search`` before an attention layer attends locally, ``MemoryReader.fuse`` afterwards.
5. ``attention`` and ``fusion``: attention over the chunks found, and the mix with attention over the segment.

``baselines``: the backbone's own layers read memory. What a search does is in ``longmem.memory``: ``bank``, then
``index``. ``families`` knows how architectures name their parts, ``probe`` computes keys without positions, ``weights``
copies layers and recognises a backbone. ``loading``, ``checkpoints`` and ``gguf`` are about files. ``explain`` says
what was read, ``alibi_gpt`` is the paper's backbone; ``generate`` is in ``longmem.generation``. The same method in
loops is in the tests, ``tests/modeling/naive.py``.
"""
