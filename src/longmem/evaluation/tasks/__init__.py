"""The evaluations of the paper, one module each, behind one interface (``longmem.evaluation.task``)."""
