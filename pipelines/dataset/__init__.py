"""The contract between the floors: what a pair, a table and a shard are, and how they are stored.

What all floors share lives here too: errors, the base of configuration, secrets, model files, the environment of
processes. Neither ray nor torch is imported here.
"""
