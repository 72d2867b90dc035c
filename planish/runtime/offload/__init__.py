"""Causal language models under a memory budget: weights that stream, caches on the host, prompts in pieces."""
