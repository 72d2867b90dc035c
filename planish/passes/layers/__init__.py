"""Passes on whole layers: leaving some of them out."""
