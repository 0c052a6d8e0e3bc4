"""What a training reports: metrics, trackers, progress of the workers, anomalies.

May import the configuration and `pipelines.dataset`.
"""
