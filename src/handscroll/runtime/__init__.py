"""The models of a checkpoint at work."""
