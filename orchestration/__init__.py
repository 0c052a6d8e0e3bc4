"""The `mapo` command: which stages a run has, which are done, and what came out."""
