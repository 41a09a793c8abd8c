"""Memory that is freed and asked for again comes from the process, not from the system."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from experiments.engine import memory

def faults():  # of writing to 64 MB that were asked for
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
counts = [faults(), faults()]
memory.keep()
print(*counts, faults(), faults())
"""
HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not HAS_GLIBC, reason="malloc is not glibc's")
def test_blocks_that_were_freed_are_there():
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    ).stdout
    first, again, _, kept = map(int, output.split())
    assert min(first, again) > 1_000  # a page has 4 or 64 kB
    assert kept < 50
