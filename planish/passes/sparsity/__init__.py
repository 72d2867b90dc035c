"""Passes that make attention block-sparse."""
