"""Rows of pixels and picture files."""
