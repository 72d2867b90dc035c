"""Relational programs on GPUs: CUDA C++ from the intra-operator IR, compiled when it is first needed."""
