"""The world that the built-in model learns: landscapes painted from a handful of named attributes.

A `Scene` says what is in the picture, in words a caption can use. `render` paints it at any size: places are relative
to the picture, lengths to its height, and texture is noise that gains octaves with resolution, so the same scene is the
same composition at 256 and at 4096 rows, only sharper.
"""

from .painting import PLACED, Box, places, render
from .scene import Scene, multiplied, sample_scene

__all__ = ["PLACED", "Box", "Scene", "multiplied", "places", "render", "sample_scene"]
