"""Compiled kernels, and where they are kept between runs.

Numba keeps what it compiled beside the source or in the user's cache, and refuses to make a kernel where neither can
be written: in a container whose user has no home, below a root that is mounted for reading alone.  There they go
into a folder of this process's own, which ends with it, and are compiled anew in every run.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import numba

from dither.errors import DitherError

SET = "Set NUMBA_CACHE_DIR to a folder that can be written"


def kept() -> bool:
    """Whether numba finds a folder for what it compiles from this one."""
    try:
        numba.njit(cache=True)(_probe)
    except RuntimeError:  # "no locator available"
        return False
    return True


def _probe() -> int:
    return 0


def _keep_for_this_process() -> str:
    try:
        folder = tempfile.mkdtemp(prefix="dither-kernels-")
    except OSError:
        raise DitherError("compiled kernels", "have no folder that can be written", f"{SET}.") from None
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    os.environ["NUMBA_CACHE_DIR"] = folder  # for processes that this one starts
    vars(numba.config)["CACHE_DIR"] = folder
    return folder


THIS_RUN = None if kept() else _keep_for_this_process()  # where kernels are kept that can be kept nowhere else
