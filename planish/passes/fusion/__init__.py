"""Exact passes that recover one operator from the several that an exporter wrote."""
