"""From a pinned snapshot to micro-batches: order, index, range reads, the loader.

May import the configuration and `pipelines.dataset`.
"""
