"""Care for a data set: verify, remove, compact, gc, history, export, describe.

May import every other room of pipelines.
"""
