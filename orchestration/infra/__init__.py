"""Manifests rendered from a run's configuration: templates, their values, and the rendering.

`infra/` at the top of the repository holds the result for infra/example.yaml.
"""
