"""Pure maths: diffusers' own modules, run row block by row block. No files, no choice of device, no printing."""
