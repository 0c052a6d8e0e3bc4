"""Rounds of training, and the lineage of models.

May import run, and both floors below.
"""
