"""What all stages share that work on units: pools of actors, shards, attempts, waiting, prefetching.

May import the configuration and `pipelines.dataset`; knows no stage.
"""
