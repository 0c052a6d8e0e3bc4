"""The contract between the packages: what a pair, a table and a shard are, and how they are stored.

Code that all packages share lives here too: errors, the base of configuration, secrets, model files, the environment
of processes. Imports neither ray nor torch.
"""
