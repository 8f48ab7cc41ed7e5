"""The models. To see how the method works, read in this order:

1. ``memory_lm``: ``MemoryLM.forward`` in three steps, run the backbone, read memory, apply the head.
2. ``backbone``: runs the unmodified model and records what its layers were given, and the keys and values to remember.
3. ``longmem``: the SideNet, copied layers beside the backbone; after each, what the backbone changed is added.
4. ``reading``: ``MemoryReader.search`` before an attention layer attends locally, ``MemoryReader.fuse`` afterwards, and
   the formula of the mix, ``fuse``.
5. ``attention``: attention over the chunks found.

``baselines``: the backbone's own layers read memory. What a search does is in ``longmem.memory``: ``bank``, then
``index``. ``families`` has what differs between architectures: names of parts, and keys without positions. ``weights``
copies layers and recognises a backbone. ``loading`` gets backbones from names and GGUF files, ``checkpoints`` has ours.
``alibi_gpt`` is the paper's backbone. ``generate``, and what each token read, are in ``longmem.generation``. The same
method in loops is in the tests, ``tests/modeling/naive.py``.
"""
