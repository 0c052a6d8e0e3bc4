"""A run as a Ray job: submit it, follow its log, stop it.

May import driver and the rooms below it.
"""
