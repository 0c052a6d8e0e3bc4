"""The contract between the floors: what a pair, a table and a shard are, and how they are stored.

Neither ray nor torch is imported here.
"""
