"""What ReLU linear attention keeps of a whole map: sums over all its positions, made in an order of their own.

On a CPU every row of a map is multiplied by itself, and rows are added in pairs, pairs in pairs, and so on: a tree that
the height of the map alone decides. So the sums are the same to the bit however the rows were cut into row blocks, and
wherever they were made: of a part of a map the tree's nodes are kept that are whole in it, and those of several parts,
put together from top to bottom, give what the whole map gives. Adding pairs also rounds less than adding row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from handscroll.banded import triton


@dataclass(frozen=True, slots=True)
class Node:
    """The sum of rows `index * 2^level ... (index + 1) * 2^level - 1` of a map."""

    level: int
    index: int
    sum: Tensor


class RowTree:
    """Adds what rows give, from top to bottom, in pairs of rows, pairs of pairs, ...

    Of n rows it keeps at most `2 log2(n) + 1` nodes, half of that where they begin with the map's first.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._spare: list[Tensor] = []

    def room(self, make: Callable[[], Tensor]) -> Tensor:
        """Memory for the next row: what a node that was added to another had, or else what `make` gives."""
        return self._spare.pop() if self._spare else make()

    def add(self, node: Node) -> None:
        """Takes the next node, which is the tree's to write to from now on."""
        while self.nodes:
            above = self.nodes[-1]
            if above.level != node.level or above.index % 2 or above.index + 1 != node.index:
                break
            self._spare.append(node.sum)
            node = Node(node.level + 1, above.index // 2, self.nodes.pop().sum.add_(node.sum))
        self.nodes.append(node)

    def total(self) -> Tensor:
        """The sum of all rows, whose nodes are gone then."""
        nodes = [node.sum for node in self.nodes]
        self.nodes, self._spare = [], []
        total = nodes.pop()
        while nodes:
            total = nodes.pop().add_(total)
        return total


class LinearAttentionSums:
    """What ReLU linear attention keeps of a map, in fp32: `sum_i relu(k_i) v_i^T` and `sum_i relu(k_i)` of every head.

    On the CPU its sums, and what is made of them, are the same to the bit however the rows were cut into row blocks.
    Row blocks must come in order, from row `first_row` of the map; they may be of any height. A row is converted to
    fp32 while it is in cache, so that no row block exists in fp32. (Elsewhere a row block is taken at once: a launch a
    row would cost more.)
    """

    def __init__(self, first_row: int = 0) -> None:
        self._tree = RowTree()
        self._next_row = first_row
        self._shape: tuple[int, int, int, int] = (0, 0, 0, 0)  # batch, heads, head_dim of keys and of values
        self.device, self.by_rows = torch.device("cpu"), True
        self._total: Tensor | None = None

    def expect(self, batch: int, heads: int, key_dim: int, value_dim: int, device: torch.device) -> None:
        """Of what shape they are and where, in case that no row comes."""
        self._shape, self.device = (batch, heads, key_dim, value_dim), device
        self.by_rows = adds_rows(device)

    @property
    def count(self) -> int:
        """How many numbers they are, as those of a node."""
        batch, heads, key_dim, value_dim = self._shape
        return batch * heads * key_dim * (value_dim + 1)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Takes the next rows: keys (before their ReLU) and values `[B, rows, W, heads, head_dim]`, of any strides."""
        batch, rows, _, heads, key_dim = keys.shape
        if not self.count:
            self.expect(batch, heads, key_dim, values.shape[-1], keys.device)
        if not self.by_rows:
            return self._accumulate(keys, values)
        for row in range(rows):
            made = self._tree.room(partial(self._new, keys.device))
            products, key_sums = self._parts(made)
            for index in range(batch):
                row_keys = _positive(keys[index, row])
                # [heads, k, pixels] @ [heads, pixels, v]
                row_values = values[index, row].float().transpose(0, 1)
                torch.bmm(row_keys.permute(1, 2, 0), row_values, out=products[index])
                torch.sum(row_keys, dim=0, out=key_sums[index])
            self._tree.add(Node(0, self._next_row, made))
            self._next_row += 1

    def _accumulate(self, keys: Tensor, values: Tensor) -> None:
        if self._total is None:
            self._total = self._new(keys.device).zero_()
        products, key_sums = self._parts(self._total)
        if triton.in_use(keys):
            triton.attention_sums(keys, values, products, key_sums)
            return
        for index, block_keys, block_values in zip(_indices(keys), _rows(keys), _rows(values), strict=True):
            block_keys = _positive(block_keys)
            products[index].baddbmm_(block_keys.permute(1, 2, 0), block_values.float().transpose(0, 1))
            key_sums[index] += block_keys.sum(dim=0)

    @property
    def nodes(self) -> list[Node]:
        """The tree's nodes of the rows that came, each `[B * heads * head_dim * (head_dim + 1)]` in fp32.

        Where rows are not added each by itself, one that stands for all that came.
        """
        if self.by_rows or self._total is None:
            return self._tree.nodes
        return [Node(0, 0, self._total)]

    def become(self, total: Tensor) -> None:
        """Takes what the nodes of all parts of a map come to, in the shape of a node, in place of what it has."""
        self._tree, self._total = RowTree(), total

    def finish(self) -> None:
        """All rows have come: of the tree's nodes their sum is left."""
        self._whole()

    @property
    def products(self) -> Tensor:
        """[B, heads, head_dim of keys, head_dim of values], when all rows have come."""
        return self._parts(self._whole())[0]

    @property
    def keys(self) -> Tensor:
        """[B, heads, head_dim of keys], when all rows have come."""
        return self._parts(self._whole())[1]

    def _whole(self) -> Tensor:
        if self._total is None:
            self._total = self._tree.total()
        return self._total

    def _new(self, device: torch.device) -> Tensor:
        return torch.empty(self.count, dtype=torch.float32, device=device)

    def _parts(self, made: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, key_dim, value_dim = self._shape
        count = batch * heads * key_dim * value_dim
        products = made[:count].view(batch, heads, key_dim, value_dim)
        return products, made[count:].view(batch, heads, key_dim)

    def apply_(self, queries: Tensor, eps: float = 1e-15) -> Tensor:
        """The attention's output for queries (before their ReLU) `[B, rows, W, heads, head_dim]`, in their shape.

        Written over the queries where values have as many channels.
        """
        products, keys = self._parts(self._whole())
        out = queries
        if products.shape[-1] != queries.shape[-1]:
            out = queries.new_empty(*queries.shape[:-1], products.shape[-1])
        if triton.in_use(queries):
            return triton.attention_apply(queries, products, keys, eps, out)
        for index, row, target in zip(_indices(queries), _rows(queries), _rows(out), strict=True):
            row = _positive(row)
            weights = (row * keys[index]).sum(dim=-1, keepdim=True).add_(eps)
            mixed = torch.bmm(row.transpose(0, 1), products[index])  # [heads, pixels, v]
            target.copy_(mixed.transpose(0, 1).div_(weights))
        return out


def adds_rows(device: torch.device) -> bool:
    """Whether every row is added by itself there: where a launch costs, and by Triton, row blocks are."""
    return device.type == "cpu" and not triton.in_use(torch.empty(0, device=device))


def _indices(row_block: Tensor) -> Iterator[int]:
    """For each of `_rows`, which of the batch it is of."""
    rows = row_block.shape[1] if row_block.device.type == "cpu" else 1
    return (index for index in range(row_block.shape[0]) for _ in range(rows))


def _rows(row_block: Tensor) -> Iterator[Tensor]:
    """`[B, rows, W, heads, d]` as rows `[W, heads, d]` one after another; where launches cost, as one for each B."""
    for image in row_block:
        yield from image if row_block.device.type == "cpu" else [image.flatten(0, 1)]


def _positive(row: Tensor) -> Tensor:
    """ReLU in fp32, in memory of its own."""
    return row.relu() if row.dtype == torch.float32 else row.float().relu_()
