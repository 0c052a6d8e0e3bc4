"""Scores of images: the scorers, one file for each family in `scorers/`, their weights, and their work on a cluster.

May import units, the configuration and `pipelines.dataset`. Importing `judges`, `plan`, `weights` or `scorers` loads
neither torch nor transformers.
"""
