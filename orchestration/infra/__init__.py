"""Manifests filled from a run's configuration: templates, what they are filled with, and how they are put together.

`infra/` at the top of the repository holds what they give for infra/example.yaml.
"""
