"""The state of flat tensors in the form of their checkpoints: exp_avg and exp_avg_sq, flat like the weights.

DeepSpeed's `ds_to_universal` makes a universal checkpoint of that, as of Adam's. `packing` says where the states of a
matrix are in it. What cannot be cut along with the weights, the step of each matrix, is said in the parameter groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist.adapters.flat import FlatAdapter, FlatRange
from ldadam_dist.arguments import check_saved_settings
from ldadam_dist.entries import Entry
from ldadam_dist.layout import Axis, Bounds, Part
from ldadam_dist.packing import Packing, Runs, dtypes_of, overlaps, planes_of, read_planes
from ldadam_dist.partitions import FlatParam, FlatPartition, Partitions
from ldadam_dist.rules import low_rank_matrices, stored_error_dtype, stored_state_dtype
from ldadam_dist.runtime import agree, exchange, finish
from ldadam_dist.state import stored_shapes

KEY = "flat_params"
"""In a saved group: {name: {"shape": [...], "steps": [one of each matrix, or one]}} of its parameters."""

WINDOW = 1 << 24
"""Elements of cut matrices that are exchanged at once."""


class FlatForm:
    """Converts the state dict of an optimizer with flat tensors; both ways are collective over their process groups.

    Args:
        partitions: the flat tensors, in the same order on all processes.
        found: what the optimizer made of them.
    """

    def __init__(self, partitions: Sequence[FlatPartition], found: Partitions) -> None:
        self._partitions, self._found = partitions, found

    def save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with a state of exp_avg and exp_avg_sq, on the CPU, for each flat tensor."""
        groups: list[dict[str, Any]] = [{**group, KEY: {}} for group in state_dict["param_groups"]]
        state = dict(state_dict["state"])
        for partition, number in self._numbered(groups):
            group = groups[partition.group_index]
            entries = self._entries(partition, group, state.get(number, {}))
            group[KEY].update(_described(partition, entries))
            state[number] = _flattened(partition, entries)
        return {**state_dict, "state": state, "param_groups": groups}

    def load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What `save` was given, in the dtypes of the saved settings; a state dict that it did not make, as it is.

        Raises:
            ValueError: the state is of other settings, of another model or number of processes; on all processes.
        """
        if not any(KEY in group for group in state_dict["param_groups"]):
            return state_dict
        numbers, here = ([len(g["params"]) for g in of] for of in (state_dict["param_groups"], optimizer.param_groups))
        if numbers != here:
            return state_dict  # torch says what differs
        groups = [dict(group) for group in state_dict["param_groups"]]
        saved = [group.pop(KEY, {}) for group in groups]
        state = dict(state_dict["state"])
        for partition, number in self._numbered(groups):
            index = partition.group_index
            found = state.get(number, {})
            self._check(optimizer, partition, groups[index], saved[index], found)
            entries = self._entries(partition, groups[index], {})
            state[number] = _named(partition, entries, groups[index], saved[index], found)
        return {**state_dict, "state": state, "param_groups": groups}

    def from_files(
        self,
        groups: Sequence[Mapping[str, Any]],
        saved: Mapping[str, Mapping[str, Any]],
        read: Callable[[str], tuple[Tensor, Tensor]],
    ) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
        """The number in a state dict, and the states, of each flat tensor, from tensors of whole parameters.

        It asks no other process.

        Args:
            groups: the parameter groups.
            saved: the `KEY` of all saved groups.
            read: gives exp_avg and exp_avg_sq of a parameter, 1-D, by its name.
        """
        for partition, number in self._numbered(groups):
            group, states = groups[partition.group_index], dict[str, dict[str, Tensor]]()
            entries = iter(self._entries(partition, group, {}))
            for param in partition.params:
                both, size = read(param.name), 0
                for step, entry in zip(saved[param.name]["steps"], entries):  # noqa: B905 -- one entry for each step
                    start, size = size, size + _elements(entry).starts[-1]
                    if entry.present:
                        states[entry.name] = _read(entry, group, step, [t[start:size] for t in both])
            yield number, states

    def _entries(self, partition: FlatPartition, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[Entry]:
        return list(self._found.entries(partition.tensor, dict(group), state))

    def _numbered(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[FlatPartition, int]]:
        """Each flat tensor with its number in a state dict."""
        numbers = [iter(group["params"]) for group in groups]
        for partition in self._partitions:
            yield partition, next(numbers[partition.group_index])

    def _check(
        self,
        optimizer: Optimizer,
        partition: FlatPartition,
        group: Mapping[str, Any],
        saved: Mapping[str, Any],
        state: Mapping[str, Tensor],
    ) -> None:
        wrong: ValueError | None = None
        try:
            check_saved(partition.params, optimizer.param_groups[partition.group_index], group, saved)
            lengths = [len(state[key]) if key in state else None for key in ("exp_avg", "exp_avg_sq")]
            if lengths != [partition.tensor.numel()] * 2:
                raise ValueError(
                    f"exp_avg and exp_avg_sq of the flat tensor of {partition.params[0].name} have {lengths} elements: "
                    f"expected {partition.tensor.numel()}. This checkpoint belongs to another number of processes; "
                    f"DeepSpeed's ds_to_universal converts it."
                )
        except ValueError as error:
            wrong = error
        if agree(torch.tensor([wrong is not None]).int(), partition.process_group, partition.device):
            raise wrong or ValueError("the state does not fit on another rank, which says why.")


def check_saved(
    params: Iterable[FlatParam], group: Mapping[str, Any], saved_group: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raise ValueError if a saved group is not that of these parameters.

    Args:
        params: of a flat tensor.
        group: their group.
        saved_group, saved: that of the checkpoint, and its `KEY`.
    """
    for param in params:
        found = list(saved[param.name]["shape"]) if param.name in saved else None
        if found != list(param.shape):
            raise ValueError(
                f"the checkpoint has parameter {param.name} with shape {found}: expected {list(param.shape)}. It "
                f"belongs to another model or to other parameter groups."
            )
        check_saved_settings(f"{param.name} of shape {param.shape}", group, saved_group)


def matrices_in(shape: Sequence[int], group: Mapping[str, Any]) -> int:
    """How many steps are counted for a parameter: one for each matrix of a stack, else one."""
    matrices = low_rank_matrices(shape, group)
    return matrices[0] if matrices else 1


def _described(partition: FlatPartition, entries: Sequence[Entry]) -> dict[str, Any]:
    """What a group says of its parameters; the same on all processes, each of which may know some steps only."""
    steps = torch.tensor([int(entry.state["step"]) if entry.state else 0 for entry in entries], dtype=torch.int32)
    every = iter(agree(steps, partition.process_group, partition.device).tolist())
    numbers = [matrices_in(param.shape, entries[0].group) for param in partition.params]
    return {
        param.name: {"shape": list(param.shape), "steps": list(itertools.islice(every, number))}
        for param, number in zip(partition.params, numbers, strict=True)
    }


def _flattened(partition: FlatPartition, entries: Sequence[Entry]) -> dict[str, Tensor]:
    dtype = _dtype(entries)
    length = max((_packing(entry).planes for entry in entries if entry.matrices), default=2)
    pair = [torch.zeros(partition.tensor.numel(), dtype=d) for d in dtypes_of(length, dtype)]
    planes = planes_of(*pair)
    for entry in entries:
        if entry.matrices is None and entry.state:
            for key, flat in zip(("exp_avg", "exp_avg_sq"), planes, strict=False):
                _run(entry, flat).copy_(entry.state[key])
    here = [entry for entry in entries if entry.matrices and entry.present]

    def joined(entry: Entry) -> Tensor:
        return _packing(entry).join(_complete(entry), dtype)

    for entry, vector in _exchanged(here, joined, partition, dtype, to_planes=True):
        at = 0
        for (start, stop), plane in zip(_mine(entry, in_planes=True), planes, strict=False):
            _run(entry, plane)[: stop - start] = vector[at : at + stop - start]
            at += stop - start
    return {"exp_avg": pair[0], "exp_avg_sq": pair[1]}


def _named(
    partition: FlatPartition,
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    flat: Mapping[str, Tensor],
) -> dict[str, dict[str, Tensor]]:
    """The states of what lies on this process, from those of its flat tensor."""
    pair = flat["exp_avg"].cpu(), flat["exp_avg_sq"].cpu()
    planes, dtype = planes_of(*pair), _dtype(entries)
    steps = dict(
        zip((e.name for e in entries), (s for p in partition.params for s in saved[p.name]["steps"]), strict=True)
    )
    here = [entry for entry in entries if entry.matrices and entry.present]

    def in_planes(entry: Entry) -> Tensor:
        runs = zip(_mine(entry, in_planes=True), planes, strict=False)
        return torch.cat([_run(entry, plane)[: stop - start].to(dtype) for (start, stop), plane in runs])

    states = {
        e.name: _vector_state(e, group, steps[e.name], [_run(e, t) for t in pair]) for e in entries if not e.matrices
    }
    for entry, vector in _exchanged(here, in_planes, partition, dtype, to_planes=False):
        states[entry.name] = _matrix_state(entry, group, steps[entry.name], vector)
    return {entry.name: states[entry.name] for entry in entries if entry.present}


def _read(entry: Entry, group: Mapping[str, Any], step: int, pair: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state of what lies on this process, from whole tensors."""
    if entry.matrices is None:
        elements = _elements(entry)
        start, stop = elements.starts[elements.index : elements.index + 2]
        return _vector_state(entry, group, step, [t[start:stop] for t in pair])
    vector = read_planes(planes_of(pair[0], pair[1]), _mine(entry, in_planes=False))
    return _matrix_state(entry, group, step, vector)


def _vector_state(entry: Entry, group: Mapping[str, Any], step: int, pair: Sequence[Tensor]) -> dict[str, Tensor]:
    dtype = stored_state_dtype(entry.param.dtype, group.get("state_dtype"), low_rank=False)
    exp_avg, exp_avg_sq = (planes_of(t, t)[0].to(dtype, copy=True) for t in pair)
    return {"step": torch.tensor(float(step)), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _matrix_state(entry: Entry, group: Mapping[str, Any], step: int, vector: Tensor) -> dict[str, Tensor]:
    state = _packing(entry).split(vector, *_kept(entry))
    error = state.pop("error").to(stored_error_dtype(entry.param.dtype, group["error_dtype"]), copy=True)
    dtype = stored_state_dtype(entry.param.dtype, group.get("state_dtype"), low_rank=True)
    factors = {key: state[key].to(dtype, copy=True) for key in ("exp_avg", "exp_avg_sq", "projector")}
    kept = {"error": error} if group["error_feedback"] else {}
    return {"step": torch.tensor(float(step)), **factors, **kept}


def _exchanged(
    entries: Sequence[Entry],
    vector_of: Callable[[Entry], Tensor],
    partition: FlatPartition,
    dtype: torch.dtype,
    to_planes: bool,
) -> Iterator[tuple[Entry, Tensor]]:
    """Each matrix with its vector where it is wanted: the states' parts become pieces of the planes, or the reverse.

    Args:
        entries: matrices in which this process takes part; in the same order on all that share one.
        vector_of: gives what this process has of one.
    """
    cut = []
    for entry in entries:
        if entry.layout().whole:
            yield entry, vector_of(entry)
        else:
            cut.append(entry)
    totals = itertools.accumulate(_elements(entry).starts[-1] for entry in cut)
    for _, window in itertools.groupby(zip(totals, cut, strict=True), key=lambda both: both[0] // WINDOW):
        members = [entry for _, entry in window]
        moved = [
            (vector_of(entry).to(partition.device), _everyones(entry, not to_planes), _everyones(entry, to_planes))
            for entry in members
        ]
        layout = members[0].layout()
        axis = layout.over_m if members[0].side == "left" else layout.over_n
        like = torch.empty(0, dtype=dtype, device=partition.device)
        yield from zip(members, (vector.cpu() for vector in _redistribute(moved, axis, like)), strict=True)


def _redistribute(moved: Sequence[tuple[Tensor, list[Runs], list[Runs]]], axis: Axis, like: Tensor) -> Iterator[Tensor]:
    """One all-to-all for vectors that are distributed one way and wanted another.

    Args:
        moved: for each vector the part of this process, and what each process has and wants.
        axis: the group.
        like: of the dtype and device of the vectors.
    Returns:
        what this process wants of each.
    """
    me, processes = axis.index, range(axis.count)
    outgoing: list[list[Tensor]] = [[] for _ in processes]
    sizes = [0 for _ in processes]
    for mine, have, want in moved:
        for p in processes:
            outgoing[p] += [mine[at : at + length] for at, _, length in overlaps(have[me], want[p])]
            sizes[p] += sum(length for *_, length in overlaps(have[p], want[me]))
    received = finish(exchange(outgoing, sizes, axis, like))
    taken = [0 for _ in processes]
    for _, have, want in moved:
        wanted = like.new_empty(sum(stop - start for start, stop in want[me]))
        for p in processes:
            for _, at, length in overlaps(have[p], want[me]):
                wanted[at : at + length] = received[p][taken[p] : taken[p] + length]
                taken[p] += length
        yield wanted


def _elements(entry: Entry) -> FlatRange:
    assert isinstance(entry.adapter, FlatAdapter)
    return entry.adapter.elements


def _packing(entry: Entry) -> Packing:
    assert entry.matrices is not None
    return Packing(*entry.matrices[1:], entry.group["rank"], entry.side)


def _bounds(entry: Entry) -> list[tuple[Bounds, Bounds, Bounds]]:
    """(error's rows, projector's rows, moments' columns) that each process keeps which shares a matrix."""
    layout, rank = entry.layout(), entry.group["rank"]
    if layout.whole:
        return [_packing(entry).whole]
    left = entry.side == "left"
    projector, moments = Part("projector", layout.m, rank), Part("moments", rank, layout.n)
    places = [(p, 0) if left else (0, p) for p in range(layout.processes)]
    rows = (layout.m_pieces if left else layout.n_pieces).bounds
    return [
        (bounds, layout.bounds(projector, place)[0], layout.bounds(moments, place)[1])
        for bounds, place in zip(rows, places, strict=True)
    ]


def _kept(entry: Entry) -> tuple[Bounds, Bounds, Bounds]:
    """What this process keeps."""
    bounds = _bounds(entry)
    return bounds[_elements(entry).index if len(bounds) > 1 else 0]


def _everyones(entry: Entry, in_planes: bool) -> list[Runs]:
    """Where in the vector of a cut matrix each process has its pieces of the planes, or its parts of the states."""
    packing = _packing(entry)
    if in_planes:
        return [packing.planes_at(start, stop) for start, stop in itertools.pairwise(_elements(entry).starts)]
    return [packing.states_at(*bounds) for bounds in _bounds(entry)]


def _mine(entry: Entry, in_planes: bool) -> Runs:
    """The same of this process."""
    packing, elements = _packing(entry), _elements(entry)
    if in_planes:
        return packing.planes_at(*elements.starts[elements.index : elements.index + 2])
    return packing.states_at(*_kept(entry))


def _run(entry: Entry, flat: Tensor) -> Tensor:
    """The elements of a parameter in a flat tensor."""
    elements = _elements(entry)
    return flat[elements.offset : elements.offset + elements.length]


def _complete(entry: Entry) -> dict[str, Tensor]:
    """The state of a matrix, zeros where there is none yet."""
    shapes = stored_shapes(entry)
    return {key: entry.state[key] if key in entry.state else torch.zeros(shape) for key, shape in shapes.items()}


def _dtype(entries: Sequence[Entry]) -> torch.dtype:
    """dtype that holds all states of a flat tensor: float32, or float64 where some are kept so."""
    group, dtype = entries[0].group, torch.promote_types(entries[0].param.dtype, torch.float32)
    state_dtype = stored_state_dtype(dtype, group.get("state_dtype"), low_rank=True)
    error_dtype = stored_error_dtype(dtype, group["error_dtype"])
    return torch.promote_types(torch.promote_types(dtype, state_dtype), error_dtype)
