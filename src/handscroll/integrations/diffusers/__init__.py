"""The drop-in: diffusers' own pipelines and autoencoders, decoding and encoding by rows.

`attach` sets two instance attributes on an `AutoencoderDC`, `_decode` and `_encode`, behind its public methods:
slicing, `return_dict`, offloading hooks and callbacks work as before. On a pipeline it also sets `check_inputs`, which
refuses before the first step what could not be decoded after the last. `detach` deletes them.

The rule: in every mode in which the module runs, the attached result is the plain one up to rounding, in the same
dtype; or the whole module is run, which is said once; or one line refuses before any work.
"""

from __future__ import annotations

from handscroll.integrations.diffusers.attach import attach, detach

__all__ = ["attach", "detach"]
