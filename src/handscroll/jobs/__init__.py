"""A job on disk: what it is, what is finished of it, and how it goes on."""
