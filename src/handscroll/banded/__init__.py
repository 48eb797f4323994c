"""Pure maths: diffusers' own modules, run band by band. No files, no choice of device, no printing."""
