"""Shared by all stages that process units: pools of actors, shards, attempts, waiting, prefetching, statistics.

May import `pipelines.resources`, `pipelines.progress` and `pipelines.dataset`; knows no stage and no configuration.
"""
