"""Memory that is freed, and asked for again at once.

A convolution network on a CPU asks for megabytes at each layer and frees them after the next. glibc gives as much back
to the system, which then has to make and clear every page anew: half of the time of a small autoencoder went there.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 1 << 25  # bytes; what is larger is given back, and its pages cost little beside the work on them


def keep() -> bool:
    """Have the C library keep freed memory for what comes next; whether it can. Memory then stays at what was the most.

    Only glibc is known to need it: elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all((mallopt(M_MMAP_THRESHOLD, LARGEST), mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)))
