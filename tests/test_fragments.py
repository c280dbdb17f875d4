"""Rows that are cut anywhere: each is completed by the process that has its first element."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from ldadam_dist.buckets import Matrix
from ldadam_dist.fragments import CutMatrix, complete_rows, hand_back
from ldadam_dist.layout import Axis, MatrixLayout, RowCut
from ldadam_dist.runtime import Job, run

CUTS = [
    ((0, 7, 13, 20), 5),  # in the middle of rows
    ((0, 1, 2, 20), 5),  # a row over three processes; the second has no row's first element
    ((0, 0, 12, 12, 20), 5),  # two processes have nothing
    ((0, 5, 9, 20), 5),  # the first is cut at the end of a row
    ((0, 5, 10, 20), 5),  # no row is cut
    ((0, 3, 6, 9, 12), 12),  # one row over all
    ((0, 20, 20), 5),  # the last has nothing
]


def random_cuts() -> list[tuple[tuple[int, ...], int]]:
    made = []
    for seed in range(200):
        draw = random.Random(seed)
        rows, columns, count = draw.randint(1, 6), draw.randint(1, 7), draw.randint(2, 6)
        inner = sorted(draw.randint(0, rows * columns) for _ in range(count - 1))
        made.append(((0, *inner, rows * columns), columns))
    return made


def test_every_row_has_one_owner_and_all_its_elements() -> None:
    for starts, columns in CUTS + random_cuts():
        cut = RowCut(starts, columns)
        count, seen = len(starts) - 1, []
        for process in range(count):
            own = range(starts[process] + cut.lent(process), starts[process + 1])
            borrowed = [range(starts[p], starts[p] + cut.lent(p)) for p in cut.lenders(process)]
            rows = [*own, *itertools.chain(*borrowed)]
            assert rows == list(range(cut.edges[process] * columns, cut.edges[process + 1] * columns)), (
                starts,
                columns,
            )
            seen += rows
        assert seen == list(range(starts[-1]))
        lenders = [p for process in range(count) for p in cut.lenders(process)]
        assert sorted(lenders) == [p for p in range(count) if cut.lent(p)]
        assert all(process in map(cut.borrower, lenders) for process in range(count) if [*cut.lenders(process)])
        assert cut.even == (not lenders)


def add_whole_rows(starts: tuple[int, ...], columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """W + 10 G, computed in whole rows and stored in pieces, for both orientations in one batch each."""
    total, rows = starts[-1], starts[-1] // columns
    weights, here = [torch.arange(float(total)), -torch.arange(float(total))], slice(starts[rank], starts[rank + 1])
    stored, empty = [], torch.empty(0)
    cut = RowCut(starts, columns)
    for transposed in (False, True):
        axis = Axis((len(starts) - 1,), rank, torch.distributed.group.WORLD)
        layout = (
            MatrixLayout(columns, rows, 1, over_n=axis, n_edges=cut.edges)
            if transposed
            else MatrixLayout(rows, columns, 1, over_m=axis, m_edges=cut.edges)
        )
        pieces = [weight[here].clone() for weight in weights]
        batch = [
            CutMatrix(layout, 2 * piece, piece, None, empty, empty, empty, cut, transposed, piece) for piece in pieces
        ]

        def exchange(batch: list[CutMatrix] = batch, layout: MatrixLayout = layout):  # type: ignore[no-untyped-def]
            yield from complete_rows(batch, torch.device("cpu"))
            for matrix in batch:
                assert isinstance(matrix, Matrix)
                assert matrix.weight.shape == (layout.m_local, layout.n_local)
                matrix.weight.add_(matrix.grad, alpha=10)
            yield from hand_back(batch, torch.device("cpu"))

        run([[Job(layout, torch.device("cpu"), (0, 0), exchange)]])
        stored.append(torch.cat(pieces))
    return stored[0], stored[1]


def all_cuts(count: int) -> list[tuple[Tensor, Tensor]]:
    rank = torch.distributed.get_rank()
    return [
        add_whole_rows(starts, columns, rank) for starts, columns in CUTS + random_cuts() if len(starts) == count + 1
    ]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_pieces_are_lent_and_come_back(count: int) -> None:
    for rank, found in enumerate(run_ranks(count, all_cuts, count)):
        cuts = [starts for starts, _ in CUTS + random_cuts() if len(starts) == count + 1]
        for starts, both in zip(cuts, found, strict=True):
            elements = torch.arange(float(starts[-1]))[starts[rank] : starts[rank + 1]]
            expected = torch.cat([elements * 21, elements * -21])
            assert all(torch.equal(stored, expected) for stored in both), starts
