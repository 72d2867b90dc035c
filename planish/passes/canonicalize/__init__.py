"""Exact passes that make a graph smaller and more regular without choosing kernels."""
