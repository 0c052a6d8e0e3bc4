"""Prompts × models → samples: PNG shards and one row for each sample, incrementally and exactly once."""
