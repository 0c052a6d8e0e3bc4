"""Trunks: the models whose embeddings scorers share. Importing this room loads torch.

May import `pipelines.dataset`, the files beside `scorers` and the light files of `scorers`; knows no scorer.
"""
