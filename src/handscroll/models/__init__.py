"""What a checkpoint is: its specs, its folder, its name, and where it is fetched from. Loads no torch."""
