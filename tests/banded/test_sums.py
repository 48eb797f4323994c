"""Sums over a map's rows, in a tree that its height alone decides."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as some

from handscroll.banded.sums import LinearAttentionSums, Node, RowTree
from handscroll.limits import tree_nodes

HEADS, DIM, WIDTH = 2, 4, 3


def added_in_pairs(rows: list[torch.Tensor]) -> torch.Tensor:
    """The same by the definition: the sum of so many rows as are the largest power of two below, and of the others."""
    if len(rows) == 1:
        return rows[0]
    half = 1 << (len(rows) - 1).bit_length() - 1
    return added_in_pairs(rows[:half]) + added_in_pairs(rows[half:])


@given(height=some.integers(1, 70), seed=some.integers(0, 9))
def test_rows_are_added_in_pairs(height: int, seed: int) -> None:
    rows = list(torch.randn(height, 5, generator=torch.Generator().manual_seed(seed)))
    tree = RowTree()
    made = 0

    def make() -> torch.Tensor:
        nonlocal made
        made += 1
        return torch.empty(5)

    for index, row in enumerate(rows):
        tree.add(Node(0, index, tree.room(make).copy_(row)))
    assert made <= tree_nodes(height)
    assert torch.equal(tree.total(), added_in_pairs(rows))


@given(data=some.data())
def test_parts_of_a_map_put_together_give_the_same_bits(data: some.DataObject) -> None:
    height, batch = data.draw(some.integers(1, 40)), data.draw(some.integers(1, 2))
    ends = sorted({height, *data.draw(some.lists(some.integers(1, height), max_size=6))})
    draw = torch.Generator().manual_seed(height)
    keys, values, queries = (torch.randn(batch, height, WIDTH, HEADS, DIM, generator=draw) for _ in range(3))
    whole = LinearAttentionSums()
    whole.add(keys, values)
    nodes: list[Node] = []
    first = 0
    for end in ends:
        part = LinearAttentionSums(first)
        for row in range(first, end):  # row by row: how a part is cut changes nothing either
            part.add(keys[:, row : row + 1], values[:, row : row + 1])
        assert len(part.nodes) <= 2 * math.log2(max(2, end - first)) + 1
        nodes += part.nodes
        first = end
    tree = RowTree()
    for node in nodes:
        tree.add(replace(node, sum=node.sum.clone()))
    part.become(tree.total())
    assert torch.equal(part.products, whole.products)
    assert torch.equal(part.keys, whole.keys)
    assert torch.equal(part.apply_(queries.clone()), whole.apply_(queries.clone()))
