"""Passes on relational programs: from what is written to what is computed, and in which kernels."""
