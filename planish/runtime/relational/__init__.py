"""Kernels of relational programs on CPUs: TIR from the intra-operator IR, compiled, and run over a graph's tables."""
