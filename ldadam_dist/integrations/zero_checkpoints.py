"""What is relied on of DeepSpeed's checkpoints: how its engine saves LDAdamW's states, and loads universal ones.

The engine's own way to load a universal checkpoint gives all groups of ZeRO-3 the settings of the first, does not load
what ZeRO-1 or 2 saved into ZeRO-3 or the reverse, and leaves out buffers and frozen parameters. So it is done here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldadam_dist.integrations.zero import ZeroLayout
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.universal import FlatForm, check_saved
from ldadam_dist.zero_files import FP32, MODEL_FILES, MOMENTS, UniversalFolder


class ZeroCheckpoints:
    """Checkpoints of an engine that steps LDAdamW.

    Args:
        engine: the engine; its ways to load are replaced if its JSON has checkpoint.load_universal.
        optimizer: its LDAdamW, attached at the latest when it is saved or loaded.
        address: DeepSpeed's class of (numel, start).
    """

    def __init__(self, engine: Any, optimizer: LDAdamW, address: Callable[..., Any]) -> None:
        self._engine, self._optimizer, self._address = engine, optimizer, address
        self._layout: ZeroLayout | None = None
        self._form: FlatForm | None = None
        self._folder: UniversalFolder | None = None
        self._wanted: dict[str, Any] = {}
        optimizer.register_state_dict_post_hook(lambda o, state: self._attached().save(o, state))
        optimizer.register_load_state_dict_pre_hook(lambda o, state: self._attached().load(o, state))
        if engine.load_universal_checkpoint():
            self._load, self._names = engine.load_checkpoint, engine._get_all_ckpt_names
            engine.load_checkpoint, engine._get_all_ckpt_names = self._load_checkpoint(), self._model_files

    def attached(self, layout: ZeroLayout, form: FlatForm) -> None:
        """Note where the parameters are, and have a default checkpoint say the same.

        DeepSpeed's own note of it, from which `ds_to_universal` works, is wrong with round_robin_gradients.
        """
        self._layout, self._form = layout, form
        zero = self._engine.optimizer
        if hasattr(zero, "_param_slice_mappings"):
            zero._param_slice_mappings = layout.slice_mappings(self._address)
        if self._engine.load_universal_checkpoint():
            zero._load_universal_checkpoint = self._load_states

    def _attached(self) -> FlatForm:
        assert self._form is not None
        return self._form

    def _load_checkpoint(self) -> Any:
        signature = inspect.signature(self._load)

        @functools.wraps(self._load)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            self._wanted = given.arguments
            return self._load(*args, **kwargs)

        return load_checkpoint

    def _model_files(self, load_dir: str, tag: str) -> list[str]:
        """The model's file; the engine asks for it before it loads anything, so the rest is checked here."""
        self._optimizer.attach_found()
        self._folder = UniversalFolder(Path(load_dir) / str(tag))
        self._check(self._folder)
        found: list[str] = self._names(load_dir, tag)
        return found or [str(path) for name in MODEL_FILES if (path := self._folder.folder / name).is_file()][:1]

    @property
    def _states(self) -> bool:
        """Whether states are wanted, and not weights alone."""
        return bool(self._wanted["load_optimizer_states"] and not self._wanted["load_module_only"])

    def _check(self, folder: UniversalFolder) -> None:
        """Raise ValueError if a checkpoint is not of this model, or its states not of these settings."""
        assert self._layout is not None
        partitions = self._layout.partitions
        extra = sorted(folder.params.keys() - {param.name for p in partitions for param in p.params})
        if extra:
            raise ValueError(
                f"{folder.folder} has states of {extra[0]} ({len(extra)} such parameters): the model has no such "
                f"parameter, or does not train it. Build the model and its groups as they were."
            )
        for partition in partitions:
            group = self._optimizer.param_groups[partition.group_index]
            for param in partition.params:
                saved = folder.groups[folder.group_of.get(param.name, 0)] if self._states else {}
                check_saved([param], group, saved, folder.params)
                for key in (FP32, *MOMENTS):
                    folder.path(param.name, key)
        if self._states:
            self._saved_groups(folder)
        scheduled = self._engine.lr_scheduler is not None and self._wanted["load_lr_scheduler_states"]
        if scheduled and not self._wanted["load_module_only"] and "lr_scheduler" not in folder.model:
            raise ValueError(
                f"{folder.folder} has no state of a learning rate schedule, as it was not saved by DeepSpeed: call "
                f"load_checkpoint(load_lr_scheduler_states=False) and set the engine's lr_scheduler yourself."
            )

    def _saved_groups(self, folder: UniversalFolder) -> list[dict[str, Any]]:
        """The saved settings of each group of the optimizer, whose parameters may have been in another order."""
        assert self._layout is not None
        found: list[dict[str, Any]] = [{} for _ in self._optimizer.param_groups]
        for partition in self._layout.partitions:
            for param in partition.params:
                settings = folder.groups[folder.group_of[param.name]]
                if found[partition.group_index] not in ({}, settings):
                    raise ValueError(
                        f"parameter {param.name} was saved in another group than others that are now in group "
                        f"{partition.group_index}, with other settings. Build the groups as they were."
                    )
                found[partition.group_index] = settings
        return found

    def _load_states(self, checkpoint_folder: str, load_optimizer_states: bool, load_from_fp32_weights: bool) -> None:
        """In the place of the same of the engine's optimizer: weights, and states if they are wanted."""
        folder, zero = self._folder, self._engine.optimizer
        assert folder is not None
        assert self._layout is not None
        if self._engine.zero_optimization_stage() == 3:
            zero.load_module_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_folder, True)
        else:  # the engine then gives them to the model
            for partition in self._layout.partitions:
                for param in partition.params:
                    run = param.elements
                    start, stop = run.starts[run.index : run.index + 2]
                    mine = partition.tensor.data[run.offset : run.offset + run.length]
                    mine.copy_(folder.tensor(param.name, FP32)[start:stop])
        self._load_rest(folder)
        if not load_optimizer_states:
            return
        if self._engine.fp16_enabled():  # the scaler is DeepSpeed's own object
            saved = torch.load(folder.folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
            if type(saved.get("loss_scaler")) is type(zero.loss_scaler):
                zero.loss_scaler = saved["loss_scaler"]
        if self._engine.zero_optimization_stage() == 3:
            zero._set_fp32_optimizer_param_groups()  # where its flat tensors are while the optimizer is loaded
        try:
            self._optimizer.load_state_dict(self._state_dict(folder))
        finally:
            if self._engine.zero_optimization_stage() == 3:
                zero._clear_fp32_optimizer_param_groups()

    def _state_dict(self, folder: UniversalFolder) -> dict[str, Any]:
        """What LDAdamW would have saved here."""
        groups = self._optimizer.param_groups
        numbers = iter(range(sum(len(group["params"]) for group in groups)))
        saved: list[dict[str, Any]] = [
            {**group, **settings, "params": [next(numbers) for _ in group["params"]]}
            for group, settings in zip(groups, self._saved_groups(folder), strict=True)
        ]

        def read(name: str) -> tuple[Tensor, Tensor]:
            return folder.tensor(name, MOMENTS[0]), folder.tensor(name, MOMENTS[1])

        form = self._attached()
        return {"state": dict(form.from_files(saved, folder.params, read)), "param_groups": saved}

    def _load_rest(self, folder: UniversalFolder) -> None:
        """Buffers and frozen parameters, which the engine leaves as the model was built."""
        assert self._layout is not None
        trained = {param.name for partition in self._layout.partitions for param in partition.params}
        module = self._engine.module
        kept = {name: p for name, p in module.named_parameters() if name not in trained}
        kept |= dict(module.named_buffers())
        for name, read in folder.rest().items():
            if name not in kept:
                continue
            target, flat = kept[name], read().reshape(-1)
            if hasattr(target, "ds_tensor"):  # ZeRO-3: each rank has a part
                length = target.partition_numel()
                flat = flat[dist.get_rank(target.ds_process_group) * length :][:length]
                target.ds_tensor.data[: len(flat)].copy_(flat)
            else:
                target.data.copy_(flat.view(target.shape))
