"""Data in motion: preference sources become pair shards, then latent and text shards (Ray Data)."""
