"""The commands of `mapo`: parse arguments and print; the work is in the rooms below.

May import every other room of orchestration.
"""
