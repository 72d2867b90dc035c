"""Passes on the tokens of a sequence: merging similar ones, dropping those that do not matter."""
