"""Many pictures from one file: on this machine's devices, or on those of a Ray cluster. No torch is loaded here."""
