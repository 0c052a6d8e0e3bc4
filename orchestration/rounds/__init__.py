"""Rounds of training, and what a model was made of.

May import run, and both floors below.
"""
