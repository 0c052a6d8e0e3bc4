"""A run on its storage: configuration, journal, lease, metrics, and encoding alongside ingest.

May import the configuration alone, and both floors below.
"""
