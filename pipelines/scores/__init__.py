"""Scores of images: the scorers, one file for each family in `scorers/`, and their weights.

May import `pipelines.dataset`. Importing `weights` or `scorers` loads neither torch nor transformers.
"""
