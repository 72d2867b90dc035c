"""Relational graph neural networks: the inter-operator IR, its builder and its reference interpreter."""
