"""The sectors of 32 bytes that the requests of warps touch in global memory."""

import numpy as np

SECTOR = 32
NOWHERE = np.uint64(2**64 - 1)


def count_sectors(address: np.ndarray, mask: np.ndarray | None, size: int) -> tuple[int, int, int, int]:
    """(requests, sectors, fewest sectors, distinct bytes) of an access of `size` bytes a thread, each summed.

    address   u8 [blocks, threads], multiples of size
    mask      bool, of the same shape; None: every thread
    """
    if mask is not None:
        address = np.where(mask, address, NOWHERE)
    threads = address.shape[1]
    if threads % 32:
        address = np.pad(address, ((0, 0), (0, -threads % 32)), constant_values=NOWHERE)
    address = np.sort(address.reshape(-1, 32), axis=1)
    sector = address >> np.uint64(5)
    some = address[:, 0] != NOWHERE
    outside = (address[:, -1] == NOWHERE).astype(np.int64)
    distinct = 1 + (address[:, 1:] != address[:, :-1]).sum(1) - outside
    sectors = 1 + (sector[:, 1:] != sector[:, :-1]).sum(1) - outside
    fewest = -(-distinct * size // SECTOR)
    return int(some.sum()), int(sectors.sum()), int(fewest.sum()), int(distinct.sum()) * size
