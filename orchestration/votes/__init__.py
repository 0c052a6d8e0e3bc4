"""Blind votes on the samples of two models: which images, and the page on loopback.

May import stages and run, and both floors below.
"""
