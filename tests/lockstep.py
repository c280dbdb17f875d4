"""All shards of a matrix in one process, stepped in lockstep: their requests are answered from all of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ldadam_dist.layout import Axis, MatrixLayout
from ldadam_dist.requests import Gather, OnOwner, Request, ScatterSum, Sum
from ldadam_dist.step import Block, Hyper, ldadam_step

Place = tuple[int, int]
"""(index over the projected dimension, index over the kept dimension) of a shard."""


class Lockstep:
    """A batch of equal matrices, oriented, cut into `cuts` = (over m, over n) shards.

    Args:
        weight: (b, m, n), the whole weights.
        rank: r.
        cuts: number of shards over either dimension.
        replicated: the shards over n are replicas that hold the whole weight.
    """

    def __init__(self, weight: Tensor, rank: int, cuts: Place, replicated: bool = False) -> None:
        b, m, n = weight.shape
        self.t = 0
        self.shape = (b, m, n)
        self.layouts: dict[Place, MatrixLayout] = {
            (i, j): MatrixLayout(m, n, rank, Axis(cuts[0], i, ("m", j)), Axis(cuts[1], j, ("n", i)), replicated)
            for i in range(cuts[0])
            for j in range(cuts[1])
        }
        self.weights, self.errors, self.states = {}, {}, {}
        for place, layout in self.layouts.items():
            columns = slice(None) if replicated else slice(*layout.n_range)
            self.weights[place] = weight[:, slice(*layout.m_range), columns].clone()
            self.errors[place] = weight.new_zeros(b, layout.m_local, layout.n_local)
            rows, cols = (stop - start for start, stop in (layout.stored_rows, layout.stored_columns))
            self.states[place] = tuple(weight.new_zeros(b, *s) for s in ((rows, rank), (rank, cols), (rank, cols)))

    def step(self, grad: Tensor, hyper: Hyper) -> None:
        """One step with the whole gradient (b, m, n)."""
        self.t += 1
        exchanges, results, answers = {}, {}, dict.fromkeys(self.layouts)
        for place, layout in self.layouts.items():
            local = grad[:, slice(*layout.m_range), slice(*layout.n_range)]
            accumulated = self.errors[place].add_(local) if hyper.error_feedback else local
            block = Block(accumulated, self.weights[place], *self.states[place])
            exchanges[place] = ldadam_step(block, layout, hyper, self.t)
        while answers:
            asked: dict[Place, Request] = {}
            for place, answer in answers.items():
                try:
                    asked[place] = exchanges[place].send(answer)
                except StopIteration as end:
                    results[place] = end.value
            assert len({type(request) for request in asked.values()}) <= 1, "shards ask for different things"
            assert not asked or len(asked) == len(self.layouts), "a shard finished early"
            answers = {place: self.answer(place, asked) for place in asked}
        self.states = results

    def answer(self, place: Place, asked: dict[Place, Request]) -> Tensor:
        request = asked[place]
        if isinstance(request, OnOwner):
            rows = []
            for i in sorted({i for i, _ in asked}):
                parts = [asked[i, j].tensor for j in sorted({j for _, j in asked})]
                rows.append(sum(parts) if request.combine == "sum" else torch.cat(parts, dim=-1))
            whole = request.function(torch.cat(rows, dim=-2))
            assert whole.shape[-1] == request.columns
            return whole[:, slice(*self.layouts[place].m_range)]
        peers = sorted((q for q in asked.values() if q.axis.group == request.axis.group), key=lambda q: q.axis.index)
        if isinstance(request, Gather):
            whole = torch.cat([q.tensor for q in peers], dim=request.dim)
            assert whole.shape[request.dim] == request.length
            return whole
        total = sum(q.tensor for q in peers)
        assert isinstance(request, (Sum, ScatterSum))
        return total if isinstance(request, Sum) else total[..., slice(*request.axis.bounds(total.shape[-1]))]

    def whole(self, shards: dict[Place, Tensor], replicated: bool = False) -> Tensor:
        """Weights or errors of all shards put together, (b, m, n)."""
        out = next(iter(shards.values())).new_empty(self.shape)
        for place, layout in self.layouts.items():
            out[:, slice(*layout.m_range), slice(None) if replicated else slice(*layout.n_range)] = shards[place]
        return out
