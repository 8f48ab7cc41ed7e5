"""Measurements with baselines and intervals, as JSON."""
