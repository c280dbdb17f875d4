"""Parameter groups for LDAdamW, and a table of what each parameter gets.

optimizer = LDAdamW(build_param_groups(model, rank=128), lr=1e-3)
print(describe(model, rank=128))
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldadam_dist.quantized import row_bytes
from ldadam_dist.rules import (
    DEFAULT_RANK,
    PROJ_TYPES,
    dtype_name,
    global_shape,
    is_low_rank,
    matrices_of,
    oriented_shape,
    projected_side,
    stored_error_dtype,
    stored_state_dtype,
    unprojected,
)
from ldadam_dist.selection import Patterns, decide, nothing_projected
from ldadam_dist.tables import format_bytes, format_percent, table


def build_param_groups(
    model: nn.Module,
    *,
    rank: int | None = None,
    lr: float | None = None,
    lr_other: float | None = None,
    lr_scale_other: float | None = None,
    weight_decay: float | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    rank_pattern: Mapping[str, int] | None = None,
    convolutions: bool = False,
    proj_type: str | None = None,
    named: bool = True,
) -> list[dict[str, Any]]:
    """Groups for `LDAdamW` in which linear layers and stacked experts are projected and everything else gets AdamW.

    The modules decide: weights of `nn.Linear` (and subclasses), transformers' Conv1D and `nn.MultiheadAttention` are
    projected, if they are larger than `rank` in both dimensions. So is each matrix of the experts that a mixture of
    experts stacks in one parameter (number, rows, columns): the module that holds it says so by its own name or its
    class ("experts", GroupedExperts, MixtralExperts, MoELayer). A router is as any other matrix: projected if it is an
    `nn.Linear` for more than `rank` experts, AdamW if it is a parameter of a router's own module. Embeddings, the head
    (`get_output_embeddings()`, or a linear layer named as one), norms, biases, LoRA and other PEFT adapters,
    convolutions, and parameters of modules that are none of these get AdamW. A tied parameter appears once, as an
    embedding if any use is one; a frozen one is left out. The model may be wrapped by DistributedDataParallel or
    torch.compile, sharded by `fully_shard`, or on the meta device: names have no wrapper's prefix, shapes are global.

    Args:
        model: the model. Build the groups after `fully_shard`, which replaces parameters.
        rank: directions kept of each projected matrix; None leaves it to the optimizer (16 by default).
        lr, lr_other: learning rate of the projected matrices, and of everything else, which has `lr` too if it is not
            given; None for both leaves them to the optimizer.
        lr_scale_other: in the place of `lr_other`, a multiple of `lr`, which the groups keep as `lr_scale`. So the
            ratio stays where a loop writes one lr into every group.
        weight_decay: of matrices, embeddings and everything else with two dimensions or more; None leaves it to the
            optimizer. Biases, norms and other vectors have none, as in Hugging Face's Trainer.
        include: project only what this matches. A list holds names, parts of names or regular expressions for whole
            names, of parameters or modules; a single string is one such regular expression; "all-linear" is the
            default. An entry that is the name of a parameter or its module, in full or its last part ("lm_head"),
            also projects what the rules above would give to AdamW: a matrix, a parameter of three dimensions as a
            stack of matrices, a convolution. Biases are not meant by the name of their module.
        exclude: give AdamW to what this matches, in the same forms; stronger than `include`.
        rank_pattern: ranks by pattern, {"down_proj": 64}; the first that matches counts.
        convolutions: project convolutions too, each as one matrix (shape[0], product of the rest): a row is an output
            channel, or for a transposed convolution an input channel.
        proj_type: put into the groups of matrices; None leaves it to the optimizer.
        named: `params` holds (name, parameter) pairs, so that errors and state dicts can name parameters. False gives
            bare parameters, for libraries that read groups before the optimizer does.
    Returns:
        Groups with `params`, `enable_lowrank` and, where they are known, `rank`, `lr`, `lr_scale`, `weight_decay` and
        `proj_type`: one group of matrices, one for each rank of `rank_pattern`, with `flatten` one of convolutions,
        then the rest with and without weight decay; no group is empty. Which groups there are follows from the model
        and the patterns alone, so that a run may resume with another learning rate or weight decay.
    """
    if lr_other is not None and lr_scale_other is not None:
        raise ValueError(
            f"lr_other={lr_other!r} and lr_scale_other={lr_scale_other!r} both say what the rest learns with: give one."
        )
    if proj_type is not None and proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type={proj_type!r} is unknown. Choose one of {', '.join(map(repr, PROJ_TYPES))}.")
    decisions = decide(
        model, rank=rank, include=include, exclude=exclude, rank_pattern=rank_pattern, convolutions=convolutions
    )
    if not any(d.low_rank for d in decisions):
        raise nothing_projected(decisions)

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    trainable = [d for d in decisions if not d.frozen]
    order = sorted(
        trainable,
        key=lambda d: (not d.low_rank, d.low_rank and d.named_rank, d.flatten, not d.info.decay),
    )
    for decision in order:
        info = decision.info
        own_rank = decision.rank if decision.low_rank and decision.named_rank else None
        said = {
            "rank": rank if own_rank is None else own_rank,
            "flatten": decision.flatten or None,
            "weight_decay": weight_decay if info.decay else 0.0,
        }
        group = groups.setdefault(
            (decision.low_rank, own_rank, decision.flatten, info.decay),  # no setting's value: see Returns
            {"params": [], "enable_lowrank": decision.low_rank} | {k: v for k, v in said.items() if v is not None},
        )
        group["params"].append((info.name, info.param) if named else info.param)
    for group in groups.values():
        group_lr = lr if group["enable_lowrank"] or lr_other is None else lr_other
        if group_lr is not None:
            group["lr"] = group_lr
        if lr_scale_other is not None and not group["enable_lowrank"]:
            group["lr_scale"] = lr_scale_other
        if proj_type is not None and group["enable_lowrank"]:
            group["proj_type"] = proj_type
    return list(groups.values())


@dataclass(frozen=True)
class _Row:
    """A line of the table: one parameter, or several alike."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: str
    side: str
    rank: int | None
    state_bytes: int
    adamw_bytes: int
    count: int = 1
    lr_scale: float = 1.0


def describe(
    target: nn.Module | torch.optim.Optimizer | Iterable[Any],
    *,
    verbose: bool = False,
    proj_type: str | None = None,
    error_feedback: bool | None = None,
    error_dtype: str | torch.dtype | None = None,
    state_dtype: str | torch.dtype | None = None,
    **options: Any,
) -> str:
    """Table of every parameter: its shape, rule and why, projected side, rank, and bytes of state against AdamW.

    The bytes are those of the whole model, which sharding divides among the processes. Layers that are alike share a
    line ('layers.*.mlp.up_proj.weight × 24').

        LDAdamW   (m·r + 2·r·n) elements of float32 (float64 for float64 parameters), with error feedback m·n more in
                  its dtype, m the projected and n the kept dimension; of a stack, for each of its matrices
        AdamW     2·m·n elements in the parameter's dtype

    or in `state_dtype`. An error in "int8" or "int4" takes 33 or 17 bytes for every 32 elements of a row, or a part of
    so many at its end; a mesh that cuts columns elsewhere than at multiples of 32 takes as much for each part.

    The columns of a convolution are all its dimensions but the first.

    Args:
        target: a model, parameter groups as `build_param_groups` returns them, or an optimizer.
        verbose: one line for each parameter.
        proj_type, error_feedback, error_dtype, state_dtype: as given to LDAdamW; by default what groups or optimizer
            say, or else "std", True, the parameter's dtype (float32 for float16) and the dtypes above.
        options: for a model, the arguments of `build_param_groups` (rank, include, exclude, rank_pattern,
            convolutions).
    """
    settings = {
        "proj_type": proj_type,
        "error_feedback": error_feedback,
        "error_dtype": error_dtype,
        "state_dtype": state_dtype,
    }
    frozen = None
    if isinstance(target, nn.Module):
        for unused in ("lr", "lr_other", "lr_scale_other", "weight_decay", "named"):
            options.pop(unused, None)
        decisions = decide(target, **options)
        rows = [
            _row(d.info.name, d.info.param, d.info.shape, d.rank, d.why, {**settings, "flatten": d.flatten})
            for d in decisions
            if not d.frozen
        ]
        frozen = [math.prod(d.info.shape) for d in decisions if d.frozen]
    else:
        if options:
            raise TypeError(f"{', '.join(options)}: only a model takes these; groups and optimizers have their own.")
        rows = _group_rows(target, settings)
    if not rows:
        raise ValueError("nothing to describe: found no trainable parameter.")
    return _render(rows if verbose else _fold(rows), frozen)


def _group_rows(target: torch.optim.Optimizer | Iterable[Any], settings: dict[str, Any]) -> list[_Row]:
    defaults = target.defaults if isinstance(target, torch.optim.Optimizer) else {}
    groups = target.param_groups if isinstance(target, torch.optim.Optimizer) else list(target)
    rows: list[_Row] = []
    for group in groups:
        if not isinstance(group, Mapping):
            raise TypeError(f"expected a model, an optimizer or a list of group dicts, found {type(group).__name__}.")
    by_others = unprojected(groups)
    for group, left in zip(groups, by_others, strict=True):
        said = {**defaults, **group}
        flatten = bool(said.get("flatten", False))
        known = {key: said.get(key) if value is None else value for key, value in settings.items()}
        known["flatten"] = flatten
        names = group.get("param_names")
        # Another optimizer's groups say nothing of a projection; a list of groups is what LDAdamW would make of it.
        unsaid = "rank" in said if defaults else not left
        rank, enabled = int(said.get("rank", DEFAULT_RANK)), bool(said.get("enable_lowrank", unsaid))
        known["lr_scale"] = said.get("lr_scale", 1.0)
        params = [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]
        for index, item in enumerate(params):
            name, param = item if isinstance(item, tuple) else (names[index] if names else f"[{len(rows)}]", item)
            shape = global_shape(param)
            why = ""
            if not is_low_rank(shape, rank, enabled, flatten):
                matrices = matrices_of(shape, flatten)
                if matrices is None:
                    why = "vector" if len(shape) < 2 else f"{len(shape)}-D"
                else:
                    why = f"rank {rank} ≥ {min(matrices[1:])}" if enabled else "by its group"
            rows.append(_row(name, param, shape, rank, why, known))
    return rows


def _row(
    name: str,
    param: torch.Tensor,
    shape: tuple[int, ...],
    rank: int,
    why: str,
    settings: Mapping[str, Any],
) -> _Row:
    """The line of one parameter; `why` says why it gets AdamW, empty if it gets LDAdamW."""
    adamw_bytes = 2 * math.prod(shape) * param.dtype.itemsize
    error_dtype, state_dtype = dtype_name(settings["error_dtype"]), dtype_name(settings["state_dtype"])
    item = stored_state_dtype(param.dtype, state_dtype, low_rank=not why).itemsize
    matrices = matrices_of(shape, settings["flatten"])
    scale = settings.get("lr_scale", 1.0)
    if why or matrices is None:
        bytes_ = 2 * math.prod(shape) * item
        return _Row(name, shape, param.dtype, f"AdamW: {why}", "", None, bytes_, adamw_bytes, lr_scale=scale)
    number, *matrix = matrices
    proj_type = settings["proj_type"] or "std"
    m, n = oriented_shape(matrix, proj_type)
    state_bytes = number * (m * rank + 2 * rank * n) * item
    if settings["error_feedback"] is None or settings["error_feedback"]:
        dtype = stored_error_dtype(param.dtype, error_dtype)
        state_bytes += number * matrix[0] * row_bytes(matrix[1], error_dtype, dtype)
    side = "rows" if projected_side(matrix, proj_type) == "left" else "columns"
    return _Row(name, shape, param.dtype, "LDAdamW", side, rank, state_bytes, adamw_bytes, lr_scale=scale)


def _fold(rows: list[_Row]) -> list[_Row]:
    """Rows whose names differ only in numbers, and in nothing else, become one."""
    alike: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
        alike.setdefault((pattern, row.shape, row.dtype, row.rule, row.side, row.rank, row.lr_scale), []).append(row)
    return [
        same[0]
        if len(same) == 1
        else _Row(
            str(key[0]),
            *(same[0].shape, same[0].dtype, same[0].rule, same[0].side, same[0].rank),
            state_bytes=sum(row.state_bytes for row in same),
            adamw_bytes=sum(row.adamw_bytes for row in same),
            count=len(same),
            lr_scale=same[0].lr_scale,
        )
        for key, same in alike.items()
    ]


def _render(rows: list[_Row], frozen: list[int] | None) -> str:
    cells: list[tuple[str, ...]] = [("parameter", "shape", "rule", "side", "rank", "state", "of AdamW")]
    cells += [
        (
            row.name + (f" × {row.count}" if row.count > 1 else ""),
            " × ".join(map(str, row.shape)) or "scalar",
            row.rule,
            row.side,
            str(row.rank or ""),
            format_bytes(row.state_bytes),
            format_percent(row.state_bytes, row.adamw_bytes),
        )
        for row in rows
    ]
    alignment = "<><<>>>"
    if any(row.lr_scale != 1 for row in rows):
        scales = ("lr", *(f"× {row.lr_scale:g}" for row in rows))
        cells, alignment = [(*line, scale) for line, scale in zip(cells, scales, strict=True)], alignment + ">"
    lines = table(cells, alignment)
    lines.append(lines[1])

    elements = sum(math.prod(row.shape) * row.count for row in rows)
    for rule in ("LDAdamW", "AdamW", ""):
        part = [row for row in rows if row.rule.partition(":")[0] == rule or not rule]
        number = sum(math.prod(row.shape) * row.count for row in part)
        state, adamw = sum(row.state_bytes for row in part), sum(row.adamw_bytes for row in part)
        lines.append(
            f"{rule or 'total':8} {sum(row.count for row in part)} parameters, {number:,} elements "
            f"({format_percent(number, elements)}), state {format_bytes(state)} against {format_bytes(adamw)} of AdamW "
            f"({format_percent(state, adamw)})"
        )
    if frozen:
        lines.append(f"frozen   {len(frozen)} parameters, {sum(frozen):,} elements, left out")
    return "\n".join(lines)
