"""Named benchmarks, and the statistics of their scores.

May import numpy, pyarrow and `pipelines.dataset`; never ray or torch.
"""
