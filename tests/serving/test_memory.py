"""A replica keeps what its model frees: seen in the pages that the kernel has to give, in a process of its own."""

import os
import subprocess
import sys

import pytest

PAGES = """
import ctypes, resource
from serving.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.mallopt(-3, 128 << 10)  # every large block is mapped anew, as in a worker of Ray

def given(blocks=20, size=16 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = given()
keep_freed_memory()
print(first, given())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(("setting", "kept"), [({}, True), ({"MALLOC_TOP_PAD_": "0"}, False)])
def test_freed_blocks_are_used_again_unless_the_environment_says_how(setting, kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | setting
    ran = subprocess.run([sys.executable, "-c", PAGES], env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert (after < before / 10) == kept
