"""Preference sources: one file for each kind, and their readers.

May import `pipelines.dataset`. `registry` and `config` are light: `pipelines.config` takes the kinds and their columns
from there.
"""
