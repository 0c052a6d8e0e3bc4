"""The stages of a run, one file each: a stage's inputs, whether it is done, and its work.

May import report, rounds, run and cluster, and both floors below; `registry.py` imports no stage.
"""
