"""Reporting of a training: metrics, trackers, progress of the workers, anomalies.

May import the configuration and `pipelines.dataset`.
"""
