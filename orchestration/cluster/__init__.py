"""This process and its Ray: connect, stop in order, notice a dead head.

May import run, and the configuration.
"""
