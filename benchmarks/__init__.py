"""Speed, always against a plain way of doing the same in the same run. Results lie in `results/` with conditions."""
