"""Permissions of files hold for root too: a test needs no other user, who may reach nothing of the environment."""

from __future__ import annotations

import ctypes
import os
import sys

# From linux/prctl.h and linux/capability.h: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH pass over permissions.
_CAPBSET_READ, _CAPBSET_DROP = 23, 24
_PASS_OVER = (1, 2)
_libc = ctypes.CDLL(None, use_errno=True)


def obey_permissions() -> None:
    """`preexec_fn` of a subprocess: what it starts may do to a file only what the file's mode says."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return
    for capability in _PASS_OVER:
        if (
            _libc.prctl(_CAPBSET_READ, capability, 0, 0, 0) == 1
            and _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) != 0
        ):
            raise OSError(ctypes.get_errno(), "root keeps the right to pass over permissions")
