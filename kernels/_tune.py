"""Launch choices that several kernels share.  Fixed rules and shipped tables: nothing here
benchmarks, and nothing asks for a driver, so importing is free on a machine without a GPU."""


def row_warps(block: int) -> int:
    """Warps for a program that holds `block` elements of a row: about 8 a thread, 16 at most."""
    return min(16, max(1, block // 256))
