"""Manifests rendered from a run's configuration: templates, their values, and the rendering.

`infra/` at the top of the repository contains the result for infra/example.yaml.
"""
