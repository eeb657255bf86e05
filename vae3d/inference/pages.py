"""Memory that goes back to the system as soon as it is let go.

Large tensors that come and go in turn with small ones leave holes in the heap, which a process
keeps. What lives long, or is given back in parts, gets pages of its own.
"""

import mmap


def private_pages(size: int) -> mmap.mmap:
    """Zeroed pages of `size` bytes, huge ones where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
