"""Tensor parallelism: one program for each device, and sums over them that overlap with computing."""
