"""LDAdamW: parameter groups, state and checkpoints; it wires adapters, batches, step and runtime."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist import arguments
from ldadam_dist.adamw import Vector, adamw_step
from ldadam_dist.adapters import Adapter, adapter_for
from ldadam_dist.buckets import Matrix, assign_owners, batches, load_block, store_block
from ldadam_dist.gradients import MISSING, UNUSABLE, ZERO, Entry, inspect_gradients
from ldadam_dist.rules import (
    DEFAULT_RANK,
    compute_dtype,
    is_low_rank,
    oriented_shape,
    projected_side,
    stored_error_dtype,
)
from ldadam_dist.runtime import Job, run
from ldadam_dist.step import Hyper, ldadam_step

EXACT_INIT_SIZE = 256
"""With projector_init="auto", the first projector comes from an SVD if the smaller dimension of the matrix is at most
this, and from a randomised subspace iteration if it is larger."""


class LDAdamW(Optimizer):
    """AdamW with low-rank moments in a subspace that follows the gradient at every step (arXiv 2410.16103).

    Each step of a matrix: the error of earlier projections is added to the gradient; one power iteration refreshes
    the projector; both moments are rotated into the new subspace; the accumulated gradient is projected, and what is
    lost goes back into the error; Adam's direction in the subspace moves the weight. Every parameter that is not a
    matrix larger than `rank` in both dimensions is stepped by `torch.optim.AdamW`'s own implementation.

    Sharded parameters (DTensors of FSDP2's `fully_shard`) keep projector, moments and error sharded, with the numbers
    of one device. State of a low-rank parameter, created at the first step: `step`, `exp_avg` and `exp_avg_sq`
    (r, n), `projector` (m, r), `error` (the parameter's shape); m is the projected dimension, n the kept one.

    A step in which any gradient is not finite is skipped on every rank: nothing changes, `skipped_steps` counts it
    and a warning tells. A matrix starts with its first gradient that is not zero everywhere.

    Args:
        params: parameters, (name, parameter) pairs or group dicts, such as `build_param_groups` returns. Group keys are
            the hyperparameters below and `enable_lowrank` (default True; False gives the group to AdamW; a matrix
            in a group that sets it to True must be larger than its rank).
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        rank: r, directions kept of each matrix.
        rho: weight of the old momentum against the new gradient when the projector is refreshed, in [0, 1).
        proj_type: dimension to project: "std" the smaller, "reverse_std" the larger, "left" rows, "right" columns.
        proj_method: "power_iteration"; "svd" or "svd_lowrank" decompose anew at every step, which costs far more.
        error_feedback: keep what the projection loses and add it to the next gradient.
        projector_init: first projector from the first gradient: "svd", "randomized" (subspace iteration), or "auto":
            SVD up to a smaller dimension of `EXACT_INIT_SIZE` or with proj_method="svd", randomised above and with
            "svd_lowrank".
        error_dtype: dtype in which the error is stored: "float32", "bfloat16", "float64" or a torch.dtype; None for
            the parameter's own (float32 for float16). The mathematics is always in float32 at least.
        process_group: group over which plain (not DTensor) parameters are replicas with equal gradients, as under
            DDP: their states are then partitioned over it. Without it each process steps them whole.

    Raises:
        ValueError: a hyperparameter out of range, arguments of another optimizer, flattened parameters, or nothing to
            project.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = DEFAULT_RANK,
        rho: float = 0.908,
        proj_type: str = "std",
        proj_method: str = "power_iteration",
        error_feedback: bool = True,
        *,
        projector_init: str = "auto",
        error_dtype: str | torch.dtype | None = None,
        process_group: Any | None = None,
        **unknown: Any,
    ) -> None:
        arguments.refuse_foreign(list(unknown))
        if unknown:
            raise TypeError(f"LDAdamW got an unexpected keyword argument {next(iter(unknown))!r}")
        self.skipped_steps = 0
        self._process_group = process_group
        self._adapters: dict[Any, Adapter] = {}
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            rho=rho,
            proj_type=proj_type,
            proj_method=proj_method,
            error_feedback=error_feedback,
            projector_init=projector_init,
            error_dtype=error_dtype,
            enable_lowrank=True,
        )
        super().__init__(params, defaults)
        arguments.check_projects([(e.name, e.param, e.group) for e in self._entries()])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds.

        Raises:
            RuntimeError: there is a process group, which does not travel.
        """
        if self._process_group is not None:
            raise RuntimeError(
                "an LDAdamW with process_group= cannot be copied or pickled, as a process group does not travel. "
                "Use state_dict() and build the other optimizer with its own group."
            )
        return {**super().__getstate__(), "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer."""
        super().__setstate__(state)
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_adapters", {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: as at construction; the optimizer is then unchanged.
        """
        required = param_group.get("enable_lowrank") is True
        super().add_param_group(dict(param_group))  # the caller's stays as it is
        try:
            group = self.param_groups[-1]
            if isinstance(group["error_dtype"], torch.dtype):  # kept as text: plain data for checkpoints
                group["error_dtype"] = str(group["error_dtype"]).removeprefix("torch.")
            arguments.check_group(group)
            group["rank"] = int(group["rank"])
            named = list(zip(_names(group, len(self.param_groups) - 1), group["params"], strict=True))
            arguments.check_params(named, group, required)
            for name, param in named:
                self._adapter(param, name)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step; collective over the meshes of the parameters.

        Args:
            closure: re-evaluates the model and returns the loss.
        Returns:
            what the closure returned, or None.
        Raises:
            ValueError: a sparse gradient, a parameter on the meta device, or a group whose rank was changed after the
                first step; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        entries = list(self._entries())
        for entry in entries:
            arguments.check_grad(entry.name, entry.param)
            arguments.check_unchanged(entry.name, entry.low_rank, entry.group, self.state.get(entry.param, {}))
        unusable = inspect_gradients(entries)
        for entry in entries:
            self._init_state(entry)

        if unusable:
            self.skipped_steps += 1
            bad = [entry.name for entry in entries if entry.status == UNUSABLE]
            others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
            which = f"the gradient of {bad[0]}{others}" if bad else "a gradient on another rank"
            warnings.warn(
                f"LDAdamW skipped this step: {which} is not finite, or too large to be squared. "
                f"No weight or state has changed. Steps skipped so far: {self.skipped_steps}.",
                stacklevel=4,  # beyond torch's two wrappers of step
            )
            return loss

        self._step_vectors([e for e in entries if not e.low_rank and e.status != MISSING])
        self._step_matrices([e for e in entries if e.low_rank and e.status != MISSING])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as `torch.optim.Optimizer.load_state_dict`, but keep every tensor's dtype.

        Args:
            state_dict: from `state_dict()` of an optimizer with the same groups.
        Raises:
            ValueError: groups or shapes that do not fit; nothing has been loaded then.
        """
        loaded: list[tuple[Entry, dict[str, Any]]] = []

        def check(_: Optimizer, saved: dict[str, Any]) -> None:
            groups = [(group, number) for group in saved["param_groups"] for number in group["params"]]
            entries = list(self._entries(trainable_only=False))
            if len(entries) == len(groups):  # otherwise torch says what differs
                for entry, (group, number) in zip(entries, groups, strict=True):
                    state = saved["state"].get(number, {})
                    sharded = bool(entry.adapter.groups)
                    arguments.check_state(entry.name, entry.param, entry.group, group, state, sharded)
                    loaded.append((entry, state))

        def restore(_: Optimizer) -> None:
            # torch has cast every state to its parameter's dtype; take the saved ones instead.
            for entry, state in loaded:
                for key, value in state.items():
                    if isinstance(value, Tensor) and key != "step":
                        self.state[entry.param][key] = value.to(device=entry.param.device)

        # As hooks, to see what the user's own hooks make of the state, and to come before those that follow.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _entries(self, trainable_only: bool = True) -> Iterator[Entry]:
        for i, group in enumerate(self.param_groups):
            for name, param in zip(_names(group, i), group["params"], strict=True):
                if param.requires_grad or not trainable_only:
                    low_rank = is_low_rank(param.shape, group["rank"], group["enable_lowrank"])
                    yield Entry(name, param, group, self._adapter(param, name), low_rank)

    def _adapter(self, param: Tensor, name: str) -> Adapter:
        key = (getattr(param, "device_mesh", None), getattr(param, "placements", None), param.device.type)
        if key not in self._adapters:
            self._adapters[key] = adapter_for(param, self._process_group, name)
        return self._adapters[key]

    def _init_state(self, entry: Entry) -> None:
        """Create what is missing of a parameter's state, without a gradient too: checkpoints want it for every one."""
        param, adapter, state = entry.param, entry.adapter, self.state[entry.param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")  # whatever the defaults
            if entry.low_rank:
                m, n = oriented_shape(param.shape, entry.group["proj_type"])
                rank, dtype = entry.group["rank"], compute_dtype(param.dtype)
                state["exp_avg"] = adapter.zeros(param, (rank, n), 1, dtype)
                state["exp_avg_sq"] = adapter.zeros(param, (rank, n), 1, dtype)
                state["projector"] = adapter.zeros(param, (m, rank), 0, dtype)
            else:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if entry.low_rank and entry.group["error_feedback"] and "error" not in state:
            kept_dim = 1 if projected_side(param.shape, entry.group["proj_type"]) == "left" else 0
            state["error"] = adapter.zeros_like(
                param, kept_dim, stored_error_dtype(param.dtype, entry.group["error_dtype"])
            )

    def _step_vectors(self, entries: list[Entry]) -> None:
        for _, members in itertools.groupby(entries, key=lambda entry: id(entry.group)):  # entries come group by group
            vectors = []
            for entry in members:
                group, state, local = entry.group, self.state[entry.param], entry.adapter.local
                # Checkpoint libraries take a step with zero gradients and lr = 0 to learn the state's shape.
                dummy = entry.status == ZERO and group["lr"] == 0 and state["step"] == 0
                if not dummy:
                    moments = (local(state["exp_avg"]), local(state["exp_avg_sq"]))
                    vectors.append(Vector(local(entry.param), entry.grad, *moments, state["step"]))
            adamw_step(
                vectors,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def _step_matrices(self, entries: list[Entry]) -> None:
        moving = []
        for entry in entries:
            if entry.status == ZERO and self.state[entry.param]["step"] == 0:
                # No direction yet to project on: only the weight decays.
                entry.adapter.local(entry.param).mul_(1 - float(entry.group["lr"]) * entry.group["weight_decay"])
            else:
                moving.append(entry)
        matrices = [self._matrix(entry) for entry in moving]
        keys = [
            (m.layout, _hyper(e), int(self.state[e.param]["step"]) + 1, compute_dtype(e.param.dtype), e.param.device)
            for e, m in zip(moving, matrices, strict=True)
        ]
        owners = assign_owners([matrix.layout for matrix in matrices])
        run(
            self._job(
                [moving[i] for i in batch], [matrices[i] for i in batch], keys[batch[0]], [owners[i] for i in batch]
            )
            for batch in batches(list(zip(keys, matrices, strict=True)))
        )

    def _matrix(self, entry: Entry) -> Matrix:
        """Views of one parameter's storage, transposed for a right projection."""
        local, state = entry.adapter.local, self.state[entry.param]
        side = projected_side(entry.param.shape, entry.group["proj_type"])
        layout = entry.adapter.layout(entry.param.shape, side, entry.group["rank"])

        def oriented(tensor: Tensor) -> Tensor:
            return tensor if side == "left" else tensor.mT

        grad = oriented(entry.grad)
        return Matrix(
            layout=layout,
            grad=grad[:, slice(*layout.n_range)] if layout.replicated else grad,
            weight=oriented(local(entry.param)),
            error=oriented(local(state["error"])) if entry.group["error_feedback"] else None,
            projector=local(state["projector"]),
            exp_avg=local(state["exp_avg"]),
            exp_avg_sq=local(state["exp_avg_sq"]),
        )

    def _job(self, entries: list[Entry], matrices: list[Matrix], key: Any, owners: list[int]) -> Job:
        layout, hyper, t, dtype, _ = key
        block = None

        def start() -> Any:
            nonlocal block
            block = load_block(matrices, dtype)
            return ldadam_step(block, layout, hyper, t)

        def finish(states: tuple[Tensor, Tensor, Tensor]) -> None:
            assert block is not None
            store_block(matrices, block, states)
            for entry in entries:
                self.state[entry.param]["step"] += 1

        return Job(layout, tuple(owners), len(matrices) * matrices[0].shard_elements, start, finish)


def _names(group: dict[str, Any], number: int) -> list[str]:
    """Names of a group's parameters for messages: their own, or their place."""
    return group.get("param_names") or [f"#{i} of group {number}" for i in range(len(group["params"]))]


def _hyper(entry: Entry) -> Hyper:
    group = entry.group
    init, method = group["projector_init"], group["proj_method"]
    small = min(entry.param.shape) <= EXACT_INIT_SIZE
    exact = init == "svd" or (init == "auto" and (method == "svd" or (small and method != "svd_lowrank")))
    return Hyper(
        lr=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        rho=group["rho"],
        proj_method=method,
        error_feedback=group["error_feedback"],
        exact_init=exact,
    )
