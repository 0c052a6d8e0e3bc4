"""Optimizers by name (`registry.py`, imports no torch), and those whose step is of all ranks' weights together.

Imports torch and the standard library; of DeepSpeed's engine only what `partition.py` is given.
"""
