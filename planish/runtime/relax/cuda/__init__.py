"""Relax modules for GPUs: products by cuBLAS, attention by our kernels, the rest generated."""
