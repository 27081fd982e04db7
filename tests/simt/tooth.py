"""Runs one entry point of teeth.cu, for test_simt.py: python tooth.py LIBRARY NAME INTEGER...

Prints the launch's message, "wrong" where its results are, else "right". A sanitizer's report ends the process.
"""

import ctypes
import sys

THREADS = 64


def main(library, name, *numbers):
    teeth = ctypes.CDLL(library)
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    memory = [ctypes.cast(libc.malloc(THREADS * 4), ctypes.POINTER(ctypes.c_float)) for _ in range(2)]
    for i in range(THREADS):
        memory[0][i], memory[1][i] = i, -1.0
    function = getattr(teeth, name)
    function.restype = ctypes.c_char_p
    pointers = memory if name in ("tooth_reverse", "tooth_misaligned", "tooth_copied") else memory[1:]
    message = None
    for seed in range(4):  # thread orders
        teeth.simt_set_order(ctypes.c_uint64(seed))
        message = message or function(*pointers, *map(int, numbers))
    if message:
        print(message.decode())
    elif name in ("tooth_reverse", "tooth_copied"):
        print("right" if memory[1][:THREADS] == [THREADS - 1.0 - i for i in range(THREADS)] else "wrong")
    elif name == "tooth_unwritten":
        print("wrong" if any(v != v for v in memory[1][:THREADS]) else "right")
    else:
        print("right")


main(*sys.argv[1:])
