"""Measures a machine, and fits a cost model to what was measured."""
