"""Checkpoints of other code into ours."""
