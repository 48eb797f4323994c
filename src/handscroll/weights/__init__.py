"""Tensors from files into modules."""
