"""The library's logger, named `anyattn`: it prints nothing until the application sets logging up.

At INFO it tells which kernels are compiled (with the seconds that took) and first used, on which GPU, and what a call
could not use and why. At WARNING it tells what costs every process time, for instance a cache that can't be written.
"""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("anyattn")
log.addHandler(logging.NullHandler())  # without it Python would print warnings itself


@functools.lru_cache(maxsize=1024)
def info_once(message: str) -> None:
    """Log a message the first time that it comes."""
    log.info("%s", message)
