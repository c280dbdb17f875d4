"""All shards of a matrix in one process, stepped in lockstep: their requests are answered from all of them at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldadam_dist.edges import shared_edges
from ldadam_dist.layout import Axis, MatrixLayout, Part, Place
from ldadam_dist.quantized import FORMATS, Quantized
from ldadam_dist.requests import Delegate, Exchange, Gather, OnOwner, Request, ScatterSum, Sum
from ldadam_dist.step import Block, Hyper, ldadam_step, step_on_owner
from ldadam_dist.weights import Weights


class Lockstep:
    """A batch of equal matrices, oriented, cut into `cuts` = (over m, over n) shards.

    Args:
        weight: (b, m, n), the whole weights.
        rank: r.
        cuts: number of shards over either dimension.
        replicas: number of processes that hold each shard of the weight, and cut it once more over n.
        gather: the matrices are stepped whole, on their owner.
        own: the replicas have gradients of their own, and do not cut n but for the states.
        error_dtype: "int8" or "int4" for errors stored so after every step.
        right: the matrices are the parameters' transposes, whose rows are then the columns here.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        cuts: Place,
        replicas: int = 1,
        gather: bool = False,
        own: bool = False,
        error_dtype: str | None = None,
        right: bool = False,
    ) -> None:
        b, m, n = weight.shape
        self.error_dtype, self.right = error_dtype, right
        self.t = 0
        self.shape = (b, m, n)
        self.step_function = step_on_owner if gather else ldadam_step
        over_n = (cuts[1], replicas) if replicas > 1 else (cuts[1],)
        self.layouts: dict[Place, MatrixLayout] = {
            (i, j): MatrixLayout(
                *(m, n, rank),
                over_m=Axis((cuts[0],), i, ("m", j)),
                over_n=Axis(over_n, j, ("n", i)),
                **({"sync" if own else "replicas": self.replicas(i, j, replicas)} if replicas > 1 else {}),
            )
            for i in range(cuts[0])
            for j in range(cuts[1] * replicas)
        }
        self.weights, self.errors, self.states = {}, {}, {}
        for place, layout in self.layouts.items():
            self.weights[place] = weight[:, slice(*layout.m_range), slice(*layout.weight_range)].clone()
            self.errors[place] = weight.new_zeros(b, layout.m_local, layout.n_local)
            rows, cols = (stop - start for start, stop in (layout.stored_rows, layout.stored_columns))
            self.states[place] = tuple(weight.new_zeros(b, *s) for s in ((rows, rank), (rank, cols), (rank, cols)))

    @staticmethod
    def replicas(i: int, j: int, number: int) -> Axis:
        return Axis((number,), j % number, ("replicas", i, j // number))

    def step(self, grad: Tensor, hyper: Hyper) -> None:
        """One step with the whole gradient (b, m, n); (replicas, b, m, n) if each has its own."""
        self.t += 1
        blocks, exchanges, results, answers = {}, {}, {}, dict.fromkeys(self.layouts)
        for place, layout in self.layouts.items():
            mine = grad[place[1] % len(grad)] if grad.ndim == 4 else grad
            local = mine[:, slice(*layout.m_range), slice(*layout.n_range)]
            accumulated = self.errors[place].add_(local) if hyper.error_feedback else local
            blocks[place] = Block(accumulated, Weights(self.weights[place]), *self.states[place])
            exchanges[place] = self.exchange(place, blocks[place], hyper)
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
        if hyper.error_feedback:
            self.errors = {place: block.accumulated for place, block in blocks.items()}

    def exchange(self, place: Place, block: Block, hyper: Hyper) -> Exchange:
        """The step of a shard, and the storing of its error."""
        layout = self.layouts[place]
        states = yield from self.step_function(block, layout, hyper, self.t)
        if self.error_dtype is not None:
            found = block.accumulated
            stored = [self.quantized(layout) for _ in found]
            edges = yield from shared_edges(stored, found, layout)
            for values, error, largest in zip(found, stored, edges, strict=True):
                error.copy_(values, edges=largest)
                values.copy_(error.to(device=values.device, dtype=values.dtype))
        return states

    def quantized(self, layout: MatrixLayout) -> Quantized:
        form = FORMATS[self.error_dtype]
        (m, n), first = (layout.m_local, layout.n_local), (layout.m_range if self.right else layout.n_range)[0]
        rows, columns = (n, m) if self.right else (m, n)
        codes, scales = form.shapes((rows, columns), first)
        tensors = torch.zeros(codes, dtype=form.dtype), torch.zeros(scales, dtype=torch.uint8)
        return Quantized(*tensors, columns, self.right, first)

    def answer(self, place: Place, asked: dict[Place, Request]) -> Any:
        request = asked[place]
        if isinstance(request, OnOwner):
            places = [sorted(set(indices)) for indices in zip(*asked, strict=True)]
            rows = [sum(asked[i, j].tensor for j in places[1]) for i in places[0]]
            whole = request.function(torch.cat(rows, dim=-2), sum(q.totals for q in asked.values()))
            assert whole.shape[-1] == request.columns
            return whole[:, slice(*self.layouts[place].m_range)]
        if isinstance(request, Delegate):
            wholes = [request.tensors[0].new_full((self.shape[0], p.rows, p.columns), torch.nan) for p in request.parts]
            for other, q in asked.items():
                for part, tensor, whole in zip(request.parts, q.tensors, wholes, strict=True):
                    self.cut(whole, part, other).copy_(tensor)
            results = request.function(*wholes)
            return tuple(self.cut(x, part, place) for part, x in zip(request.returns, results, strict=True))
        if request.axis.count == 1:
            return request.alone()
        peers = sorted((q for q in asked.values() if q.axis.group == request.axis.group), key=lambda q: q.axis.index)
        if isinstance(request, Gather):
            whole = torch.cat([q.tensor for q in peers], dim=request.dim)
            assert whole.shape[request.dim] == request.length
            return whole
        total = sum(q.tensor for q in peers)
        assert isinstance(request, (Sum, ScatterSum))
        return total if isinstance(request, Sum) else total[..., slice(*request.axis.bounds(total.shape[-1]))]

    def cut(self, whole: Tensor, part: Part, place: Place) -> Tensor:
        """View of what a shard has of a whole tensor."""
        rows, columns = self.layouts[place].bounds(part, place)
        return whole[:, slice(*rows), slice(*columns)]

    def whole(self, shards: dict[Place, Tensor]) -> Tensor:
        """Weights or errors of all shards put together, (b, m, n); NaN where none has anything."""
        out = next(iter(shards.values())).new_full(self.shape, torch.nan)
        for place, layout in self.layouts.items():
            columns = layout.weight_range if shards is self.weights else layout.n_range
            block = out[:, slice(*layout.m_range), slice(*columns)]
            if layout.sync.count > 1 and shards is self.errors:  # their mean
                block.copy_(block.nan_to_num() + shards[place] / layout.sync.count)
            else:
                block.copy_(shards[place])
        return out
