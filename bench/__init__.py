"""Benchmarks: `make bench`. Each prints its figures; those of speed as ratios to a peer in the same run."""
