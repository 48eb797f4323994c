"""Pinned host memory as PyTorch gives it: in blocks whose sizes are powers of two. No torch.

Its allocator rounds every block up, so a layer of 160 MiB would take 256. Several layers to a block waste less: of 20
such layers an eighth. (Memory of our own could be pinned to the byte by `cudaHostRegister`. But PyTorch then no longer
knows which copies still read from it, and a failure there shows up in whatever kernel is launched next.)
"""

from __future__ import annotations


def pinned_bytes(n_bytes: int) -> int:
    """What a block of so many bytes takes."""
    return 1 << max(0, n_bytes - 1).bit_length() if n_bytes else 0


def pinned_blocks(count: int, each_bytes: int, room_bytes: int | None = None) -> list[int]:
    """Sizes of the blocks for `count` pieces of `each_bytes`, none of which lies in two blocks.

    All of them together take no more than the room, which may be too little for all pieces.
    """
    blocks: list[int] = []
    left_bytes = 2**62 if room_bytes is None else room_bytes
    while count > 0:
        block = 1 << (count * each_bytes).bit_length() - 1  # no more than all that are left take
        block = max(block, pinned_bytes(each_bytes))
        while block > left_bytes and block // 2 >= each_bytes:
            block //= 2
        if block > left_bytes:
            break
        blocks.append(block)
        left_bytes -= block
        count -= block // each_bytes
    return blocks
