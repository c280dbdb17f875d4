"""LDAdamW: parameter groups, state and checkpoints; it wires adapters, batches, step and runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldadam_dist import arguments
from ldadam_dist.adamw import step_vectors
from ldadam_dist.entries import UNUSABLE, Entry, first_matrix, names_of
from ldadam_dist.gradients import warn_skipped
from ldadam_dist.grouping import as_given, forget_names, inherited, name_alike, regrouped
from ldadam_dist.in_grad import refuse_replicas
from ldadam_dist.inspection import Inspectable
from ldadam_dist.load_checks import check_form, check_own_errors
from ldadam_dist.lowrank import step_matrices
from ldadam_dist.plan import WINDOW_ELEMENTS
from ldadam_dist.replicas import Replicas
from ldadam_dist.rules import DEFAULT_RANK, dtype_name
from ldadam_dist.runtime import Presence, during, start_anew
from ldadam_dist.state import check_own, init_state, own_error, stored_error
from ldadam_dist.state_dicts import Loading, with_floating_errors


class LDAdamW(Inspectable):
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
            in a group that sets it to True must be larger than its rank), `flatten` (default False; True sees a
            parameter of three dimensions or more as one matrix (shape[0], rest), as of a convolution) and `lr_scale`
            (default 1.0; a step takes lr · lr_scale). Beside groups with a `rank`, those that say nothing of a
            projection get AdamW.
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
        error_dtype: how the error is stored: "float32", "bfloat16", "float64" or a torch.dtype; "int8" or "int4", with
            a scale for every 32 elements of a row, the same on any mesh; None for the parameter's own dtype (float32
            for float16). The mathematics is always in float32 at least.
        state_dtype: dtype in which projector and moments are stored, those of AdamW too: "float32", "bfloat16" or
            "float64"; None for that of the mathematics, and for AdamW the parameter's own.
        stochastic_rounding: round what is stored narrower than it is computed (weights, errors, moments) up or down
            at random, so that small changes add up; from the step and the place alone, so on any mesh alike.
        process_group: group over which plain (not DTensor) parameters are replicas with equal gradients, as under
            DDP: their states are then partitioned over it. Without it each process steps them whole.
        gradient_sync: "full": gradients have been averaged over replicas before a step, as DDP and HSDP do. "lowrank":
            nobody has averaged them, and a step exchanges low-rank contractions instead, for the same numbers
            (docs/sharding.md). The replicas are those of `process_group` or `replicate_mesh`, with an error for each.
        replicate_mesh: with gradient_sync="lowrank", the dimension of a device mesh over which shards on its other
            dimensions are replicas; in the place of `process_group`.
        check_replicas_every: after how many steps to compare the replicas of `process_group` or `replicate_mesh` bit by
            bit, as at the first: their weights and, with gradient_sync="full", their gradients; 0 for never again.
        communication: how a shared matrix is stepped: "lowrank", on its shards, which exchange low-rank factors;
            "gather", brought to the rank that owns it; "auto", as moves fewer elements. The numbers are the same.
        window_elements: elements of matrices in flight together on a rank; bounds the transient memory of a step.
        error_in_grad: keep errors in `param.grad`, where backward adds gradients to them, which then need no memory of
            their own. Only backward may write there (docs/performance.md); clip with `ldadam_dist.clip_grad_norm_`.
        capturable: from the second step on the host reads nothing, so that a CUDA graph can hold a step of one device;
            an `lr` that changes is to be a tensor there. Skipped steps are counted without a warning.
        metrics_every: after how many steps to measure one, for `metrics()`; 0 for none. The same on all ranks.

    Raises:
        ValueError: a hyperparameter out of range, arguments of another optimizer, flattened parameters, placements that
            are not supported, or nothing to project.
    """

    _built = False
    """Whether groups that are added come after those of the constructor."""
    _presence: Presence | None = None

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
        state_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool = False,
        process_group: Any | None = None,
        gradient_sync: str = "full",
        replicate_mesh: Any | None = None,
        check_replicas_every: int = 0,
        communication: str = "auto",
        window_elements: int = WINDOW_ELEMENTS,
        error_in_grad: bool = False,
        capturable: bool = False,
        metrics_every: int = 0,
        **unknown: Any,
    ) -> None:
        arguments.refuse_foreign(list(unknown))
        if unknown:
            raise TypeError(f"LDAdamW got an unexpected keyword argument {next(iter(unknown))!r}")
        arguments.check_window(window_elements)
        self.replicas, self._window = Replicas.chosen(gradient_sync, process_group, replicate_mesh), window_elements
        refuse_replicas(error_in_grad, self.replicas)
        self._check_every, self._steps = arguments.checked_interval(check_replicas_every, self.replicas.group), 0
        self._forget()
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
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            enable_lowrank=True,
            flatten=False,
            communication=communication,
            capturable=capturable,
            metrics_every=metrics_every,
        )
        super().__init__(as_given(params), defaults, error_in_grad)
        self._built = True
        entries = list(self._entries())
        arguments.check_projects([(e.name, e.param, e.group) for e in entries])
        self._presence = Presence([(e.name, e.shape) for e in entries], self.replicas.group)
        start_anew()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds.

        Raises:
            RuntimeError: there is a process group, which does not travel, or a step was interrupted.
        """
        self._refuse_torn("a copy or a pickle")
        if self.replicas.group is not None or self._partitions:
            owner = "that DeepSpeed's engine steps" if self._partitions else "with process_group= or replicate_mesh="
            raise RuntimeError(
                f"an LDAdamW {owner} cannot be copied or pickled, as a process group does not travel. "
                "Use state_dict() and build the other optimizer with its own group."
            )
        return {**super().__getstate__(), "_window": self._window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer; `load_state_dict` ends here too."""
        super().__setstate__(state)
        self._built = True
        self.__dict__.setdefault("_window", WINDOW_ELEMENTS)
        if not hasattr(self, "_adapters"):
            self.replicas, self._check_every, self._steps = Replicas(), 0, 0
            self._forget()
        for group in self.param_groups:
            for name in self.defaults.keys() - {"differentiable"}:  # torch has put it there, but not in new groups
                group.setdefault(name, self.defaults[name])
            self._note(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Once the optimizer is built, settings that the group does not have are those of the other projected groups, if
        these agree; lr, weight_decay, enable_lowrank and flatten are the optimizer's defaults. Names may be missing
        where other groups have them, or the other way round: they are made up.

        Raises:
            ValueError: as at construction; the optimizer is then unchanged.
        """
        required = param_group.get("enable_lowrank") is True
        unsaid = not param_group.keys() & {"rank", "enable_lowrank"}
        shared = inherited(self.param_groups, self.defaults) if self._built else {}
        added = shared | param_group  # the caller's stays as it is
        newly_named = name_alike(added, self.param_groups)
        try:
            super().add_param_group(added)
        except Exception:
            forget_names(newly_named)
            raise
        try:
            group = self.param_groups[-1]
            for key in ("error_dtype", "state_dtype"):
                group[key] = dtype_name(group[key])
            arguments.check_group(group)
            arguments.plain_numbers(group)
            named = list(zip(names_of(group, len(self.param_groups) - 1), group["params"], strict=True))
            arguments.check_params(named, group, required)
            for name, param in named:
                entry = self._entry(name, param, group)
                entry.adapter.check(param, name)
                self._check_settings(entry)
            if unsaid:
                arguments.warn_whole_model(named, group)
            self._note(group)
        except Exception:
            self.param_groups.pop()
            forget_names(newly_named)
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
            RuntimeError: ranks have different parameters or settings, or replicas different weights, found at the
                first step; a gradient that must be redistributed is missing on some rank; with error_in_grad, an error
                holds more than gradients; or DeepSpeed has flattened the parameters and no engine is attached; or a
                graph is captured too early.
                Nothing has changed then either. Or a collective failed, as a rank has stalled or died, which is named
                with the matrices: the run must start again from its last checkpoint.
                After an exception in the midst of a step, steps and state dicts are refused until a checkpoint is
                loaded; but see `whole.Progress`.
        """
        if closure is not None or not self._goes_on():
            self._refuse_torn("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        with ExitStack() as stack:  # a step's dtypes are its own, whatever the caller's autocast says
            for kind in {param.device.type for group in self.param_groups for param in group["params"]}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.push(self._interrupted)
            self._step_all()
        return loss

    def _step_all(self) -> None:
        self.attach_found()
        entries = list(self._entries())
        if self._presence is not None and not self._partitions:
            self._presence.check(self._steps)
        for entry in entries:
            try:
                arguments.check_grad(entry.name, entry.param)
                arguments.check_storage(entry.name, entry.adapter.local(entry.param), entry.group["flatten"])
                arguments.check_unchanged(entry.name, entry.matrices is not None, entry.group, entry.state)
            except ValueError as error:
                if not entry.adapter.groups:
                    raise
                entry.refusal = error  # to be raised when the other ranks, which would wait, know it too
        with self._errors_taken(entries):
            self._take_step(entries)

    def _step(self, entries: list[Entry]) -> None:
        """Step what was found usable; collective."""
        with during(lambda: f"compared gradients with others, before the first matrix, {first_matrix(entries)}"):
            overflowed = self._partitions.overflowed()
            unusable = overflowed or self._inspect(entries)
        for entry in entries:
            entry.state = self._state_of(entry)
            init_state(entry)

        if unusable:
            if not overflowed or self._partitions.number(entries[0].param) == 0:
                self._skipped += 1
                bad = [entry.name for entry in entries if entry.status == UNUSABLE]
                warn_skipped(bad, self._forget_unusable(entries), self.skipped_steps)
            return

        vectors = [entry for entry in entries if entry.matrices is None]
        parts = [[e for e in some if e.matrices is not None] for some in self._stepped_together(entries)]
        plans = [self._windows(matrices) for matrices in parts]
        progress = self._begin(not self.error_in_grad and not any(entry.adapter.groups for entry in entries))
        with self.replicas.averaging(vectors):
            for matrices, plan in zip(parts, plans, strict=True):
                self._keep_measures(matrices, step_matrices(matrices, plan, progress=progress))
        step_vectors(vectors)
        self._steps += 1
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.Optimizer.state_dict`; an error in 8 or 4 bits appears in bfloat16, exactly.

        With gradient_sync="lowrank" the error is the mean of the replicas', which is all that decides on the next
        steps; collective then. `own_errors` has them as they are, for a resume to the last bit.

        Raises:
            RuntimeError: a step was interrupted, and has left what no run can go on from.
        """
        self._refuse_torn("state_dict()")
        self.attach_found()

        def decode(_: Optimizer, made: dict[str, Any]) -> dict[str, Any]:
            return with_floating_errors(made, self._entries_by_param, self._partitions, not self.replicas.averaged)

        hook = self.register_state_dict_post_hook(decode, prepend=True)  # before those that see what is saved
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as `torch.optim.Optimizer.load_state_dict`, and store it as this optimizer's groups say.

        After a step that was interrupted it lets the run go on; load the weights of the same checkpoint too.

        Args:
            state_dict: from `state_dict()` of an optimizer with the same groups, or with parameters of the same names
                in fewer; their error_dtype, state_dtype and stochastic_rounding may be others, and stay as they are
                here.
        Raises:
            ValueError: groups, shapes or values that do not fit, or another rank's shards. Whatever is raised, nothing
                has been loaded then.
        """
        self.attach_found()
        check_form(state_dict, self.param_groups)
        loading = Loading(self._entries_by_param, self._partitions, self._state_of, self._check_settings)
        # As hooks, to see what the user's own hooks make of the state, and to come before those that follow.
        hooks = (
            self.register_load_state_dict_pre_hook(loading.check),
            self.register_load_state_dict_post_hook(loading.restore, prepend=True),
        )
        before = self.state, self.param_groups  # torch replaces both, and changes neither
        try:
            super().load_state_dict(regrouped(state_dict, self.param_groups))
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            for hook in hooks:
                hook.remove()
        self._end()
        self._loaded += 1

    def own_errors(self) -> dict[str, Tensor]:
        """The errors of all replicas, with gradient_sync="lowrank": to be saved beside `state_dict`.

        Returns:
            by name of the parameter, a DTensor (replicas, ...) of which each replica has its own; empty before the
            first step.
        """
        self._refuse_torn("own_errors()")
        return {entry.name: own_error(entry) for entry in self._own_errors()}

    def load_own_errors(self, errors: Mapping[str, Tensor]) -> None:
        """Load what `own_errors` gave on as many replicas, after `load_state_dict`; on another number leave this out.

        Raises:
            ValueError: other parameters, another number of replicas, or another replica's part; nothing has been
                loaded then.
        """
        expected = self.own_errors()
        check_own_errors(errors, expected)
        for entry in self._own_errors():
            check_own(entry, errors[entry.name])
        made = []
        for entry in self._own_errors():
            local = entry.adapter.local(errors[entry.name])[0]
            made.append((entry, stored_error(entry, local.to(entry.adapter.local(entry.param).device))))
        for entry, error in made:
            self.state[entry.param].update(error)

    def _check_settings(self, entry: Entry) -> None:
        """Raise ValueError if a parameter cannot be stepped with the settings of its group."""
        self.replicas.check(entry.name, entry.group)
        self._check_fits(entry)

    def _own_errors(self) -> list[Entry]:
        """The parameters of which each replica has an error of its own."""
        return [e for e in self._entries() if e.matrices and e.adapter.sync is not None and "error" in e.state]
