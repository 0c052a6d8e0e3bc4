"""Bring a run up to date: plan the stages, hold the run's lease, do the missing work.

May import stages and the rooms below it.
"""
