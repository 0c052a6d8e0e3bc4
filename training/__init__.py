"""MaPO training on Ray Train and DeepSpeed, from a pinned snapshot to a diffusers model."""
