"""Memory that a step frees is kept for the next one."""

import ctypes
import sys

_KEPT = {  # parameters of glibc's mallopt, by their numbers in malloc.h
    -8: 1,  # M_ARENA_MAX: one heap for all threads, for those of their own cannot grow as large
    -4: 0,  # M_MMAP_MAX: no block outside of it
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: what is free at its end is given back from this size on
}


def keep() -> None:
    """Keeps what XLA:CPU frees at the end of a step; to be called before JAX has devices.

    Otherwise glibc gives large blocks back to the system, which fills new ones with zeros, page by
    page: 330 MB in each step of ResNet-20 with batches of 128, on 2 cores a quarter of a dense
    step's time and two fifths of one with a twentieth of the weights.
    Where malloc is not glibc's, nothing happens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda number, value: None)
        for number, value in _KEPT.items():
            mallopt(number, value)
