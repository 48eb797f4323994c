"""Noise becomes a latent."""
