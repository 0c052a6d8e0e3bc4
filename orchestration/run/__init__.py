"""A run on its storage: configuration, journal, lease, metrics, and encoding beside ingest.

May import the configuration alone, and both floors below.
"""
