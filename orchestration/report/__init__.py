"""Report of a run and index of runs, made from the storage alone.

May import rounds and run, the registry of stages, and both floors below.
"""
