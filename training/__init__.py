"""How the built-in model was made: a painted world, captions for it, an autoencoder, a transformer."""
