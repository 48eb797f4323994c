"""handscroll: exact row-by-row text-to-image with the Sana family. Importing it loads no torch."""
