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
from ldadam_dist.consistency import check_ranks_agree
from ldadam_dist.entries import MISSING, UNUSABLE, ZERO, Entry
from ldadam_dist.gradients import inspect_gradients
from ldadam_dist.lowrank import plan_windows, step_matrices
from ldadam_dist.placement import Placement, placement
from ldadam_dist.plan import WINDOW_ELEMENTS, Unit
from ldadam_dist.rules import DEFAULT_RANK, is_low_rank, matrices_of
from ldadam_dist.state import init_state


class LDAdamW(Optimizer):
    """AdamW with low-rank moments in a subspace that follows the gradient at every step (arXiv 2410.16103).

    Each step of a matrix: the error of earlier projections is added to the gradient; one power iteration refreshes
    the projector; both moments are rotated into the new subspace; the accumulated gradient is projected, and what is
    lost goes back into the error; Adam's direction in the subspace moves the weight. Every parameter that is not a
    matrix larger than `rank` in both dimensions is stepped by `torch.optim.AdamW`'s own implementation.

    DTensor parameters (of FSDP2, HSDP, tensor parallelism or any mix) have projector, moments and error partitioned
    over their whole mesh, with the numbers of one device; docs/sharding.md says how. State of a low-rank parameter,
    created at the first step: `step`, `exp_avg` and `exp_avg_sq` (r, n), `projector` (m, r), `error` (the matrix's
    shape); m is the projected dimension, n the kept one. A 3-D parameter (E, rows, columns) is a stack of E matrices,
    as of experts: its states have E in front, `step` too, as each matrix starts with its own first gradient.

    A step in which any gradient is not finite is skipped on every rank: nothing changes, `skipped_steps` counts it
    and a warning tells. A matrix starts with its first gradient that is not zero everywhere.

    Args:
        params: parameters, (name, parameter) pairs or group dicts, such as `build_param_groups` returns. Group keys are
            the hyperparameters below, `enable_lowrank` (default True; False gives the group to AdamW; a matrix
            in a group that sets it to True must be larger than its rank) and `flatten` (default False; True sees a
            parameter of three dimensions or more as one matrix (shape[0], rest), as of a convolution).
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
        communication: how a shared matrix is stepped: "lowrank", on its shards, which exchange low-rank factors;
            "gather", brought to the rank that owns it; "auto", as moves fewer elements. The numbers are the same.
        window_elements: elements of matrices in flight together on a rank; bounds the transient memory of a step.

    Raises:
        ValueError: a hyperparameter out of range, arguments of another optimizer, flattened parameters, placements that
            are not supported, or nothing to project.
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
        communication: str = "auto",
        window_elements: int = WINDOW_ELEMENTS,
        **unknown: Any,
    ) -> None:
        arguments.refuse_foreign(list(unknown))
        if unknown:
            raise TypeError(f"LDAdamW got an unexpected keyword argument {next(iter(unknown))!r}")
        arguments.check_window(window_elements)
        self.skipped_steps = 0
        self._process_group = process_group
        self._window = window_elements
        self._adapters: dict[Any, Adapter] = {}
        self._plan: tuple[Any, list[list[Unit]]] | None = None
        self._ranks_agree = False
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
            flatten=False,
            communication=communication,
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
        return {**super().__getstate__(), "skipped_steps": self.skipped_steps, "_window": self._window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer."""
        super().__setstate__(state)
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("_window", WINDOW_ELEMENTS)
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_adapters", {})
        self.__dict__.setdefault("_plan", None)
        self.__dict__.setdefault("_ranks_agree", False)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: as at construction; the optimizer is then unchanged.
        """
        required = param_group.get("enable_lowrank") is True
        super().add_param_group(dict(param_group))  # the caller's stays as it is
        try:
            self._ranks_agree = False
            group = self.param_groups[-1]
            if isinstance(group["error_dtype"], torch.dtype):  # kept as text: plain data for checkpoints
                group["error_dtype"] = str(group["error_dtype"]).removeprefix("torch.")
            arguments.check_group(group)
            group["rank"] = int(group["rank"])
            named = list(zip(_names(group, len(self.param_groups) - 1), group["params"], strict=True))
            arguments.check_params(named, group, required)
            for name, param in named:
                self._adapter(param, name, group["flatten"]).check(param, name)
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
            RuntimeError: ranks have different parameters or settings, found at the first step; or a gradient that must
                be redistributed is missing on some rank. Nothing has changed then either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        entries = list(self._entries())
        for entry in entries:
            arguments.check_grad(entry.name, entry.param)
            arguments.check_storage(entry.name, entry.adapter.local(entry.param), entry.group["flatten"])
            arguments.check_unchanged(
                entry.name, entry.matrices is not None, entry.group, self.state.get(entry.param, {})
            )
        if not self._ranks_agree:
            check_ranks_agree(entries, self.state, self._window)
            self._ranks_agree = True
        unusable = inspect_gradients(entries)
        for entry in entries:
            init_state(entry, self.state[entry.param])

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

        self._step_vectors([e for e in entries if e.matrices is None and e.status != MISSING])
        matrices = [entry for entry in entries if entry.matrices is not None]
        step_matrices(matrices, self.state, self._windows(matrices))
        return loss

    def placement(self) -> Placement:
        """Where every parameter's states are, who owns its matrices, how it is stepped and what that moves.

        `print(optimizer.placement())` gives a table. It asks no other rank, before the first step and after.
        """
        entries = list(self._entries())
        return placement(entries, self._windows([entry for entry in entries if entry.matrices is not None]))

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
                    sharded = entry.adapter.sharded
                    arguments.check_state(entry.name, entry.param, entry.group, group, state, sharded)
                    loaded.append((entry, state))

        def restore(_: Optimizer) -> None:
            # torch has cast every state to its parameter's dtype; take the saved ones instead.
            self._ranks_agree = False
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
                    settings = group["rank"], group["enable_lowrank"], group["flatten"]
                    matrices = (
                        matrices_of(param.shape, group["flatten"]) if is_low_rank(param.shape, *settings) else None
                    )
                    yield Entry(name, param, group, self._adapter(param, name, group["flatten"]), matrices)

    def _adapter(self, param: Tensor, name: str, flatten: bool) -> Adapter:
        where = (getattr(param, "device_mesh", None), getattr(param, "placements", None), param.device)
        key = (*where, param.ndim, flatten)
        if key not in self._adapters:
            self._adapters[key] = adapter_for(param, self._process_group, name, flatten)
        return self._adapters[key]

    def _windows(self, entries: list[Entry]) -> list[list[Unit]]:
        """The plan of the matrices; made anew when they or their settings change."""
        keys = ("rank", "proj_type", "proj_method", "error_feedback", "communication")
        made_of = tuple((e.adapter, e.matrices, *(e.group[key] for key in keys)) for e in entries)
        if self._plan is None or self._plan[0] != made_of:
            self._plan = made_of, plan_windows(entries, self._window)
        return self._plan[1]

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


def _names(group: dict[str, Any], number: int) -> list[str]:
    """Names of a group's parameters for messages: their own, or their place."""
    return group.get("param_names") or [f"#{i} of group {number}" for i in range(len(group["params"]))]
