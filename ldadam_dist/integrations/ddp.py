"""DistributedDataParallel with gradient_sync="lowrank": DDP averages what AdamW steps, and leaves matrices alone.

model = DistributedDataParallel(model)
optimizer = LDAdamW(build_param_groups(model.module), gradient_sync="lowrank", process_group=model.process_group)
keep_matrices_local(model, optimizer)
"""

from typing import Any  # annotations are not postponed here: DDP compares those of a hook

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ldadam_dist.optimizer import LDAdamW


def keep_matrices_local(model: DistributedDataParallel, optimizer: LDAdamW) -> None:
    """Have backward average only the gradients of parameters that AdamW steps, or that the optimizer does not have.

    Call it once on every rank, before the first backward. Those of projected matrices stay each replica's own: the
    optimizer averages their contractions. `no_sync()` is for accumulation as ever: when the optimizer steps, it
    averages what is not the same on all replicas.

    Args:
        model: wraps the module whose parameters the optimizer has.
        optimizer: built with gradient_sync="lowrank" over the model's process group.

    Raises:
        ValueError: no DistributedDataParallel, another optimizer, another process group, or another model's parameters.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(f"keep_matrices_local got a {type(model).__name__}: expected DistributedDataParallel.")
    if not isinstance(optimizer, LDAdamW) or optimizer.replicas.averaged:
        raise ValueError(
            "keep_matrices_local got an optimizer that steps averaged gradients: expected "
            "LDAdamW(..., gradient_sync='lowrank', process_group=model.process_group)."
        )
    theirs, ours = (dist.get_process_group_ranks(group) for group in (model.process_group, optimizer.replicas.group))
    if theirs != ours:
        raise ValueError(
            f"DistributedDataParallel has replicas on ranks {theirs}, the optimizer on {ours}: expected the same. "
            f"Build LDAdamW with process_group=model.process_group."
        )
    hook = _Hook(model.process_group, optimizer.matrices())
    if not any(id(param) in hook.matrices for param in model.parameters()):
        raise ValueError(
            "keep_matrices_local got a model with none of the optimizer's matrices: expected the optimizer of this "
            "model, built with its parameters as they are now."
        )
    model.register_comm_hook(hook, _Hook.reduce)
    optimizer.replicas.hooked = True


class _Hook:
    """Has DDP average the gradients of all but these parameters.

    Args:
        group: process group.
        matrices: ids of the parameters whose gradients stay.
    """

    def __init__(self, group: Any, matrices: set[int]) -> None:
        self._group, self._size, self.matrices = group, dist.get_world_size(group), matrices

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """The communication hook."""
        buffer: Tensor = bucket.buffer()
        both = zip(bucket.parameters(), bucket.gradients(), strict=True)
        others = [grad for param, grad in both if id(param) not in self.matrices]
        if not others:
            done: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[buffer.device] if buffer.device.type == "cuda" else None
            )
            done.set_result(buffer)
            return done
        vector = torch.cat([grad.reshape(-1) for grad in others]).div_(self._size)
        reducing = dist.all_reduce(vector, group=self._group, async_op=True)
        assert reducing is not None

        def put_back(_: torch.futures.Future[Any]) -> Tensor:
            pieces = vector.split([grad.numel() for grad in others])
            for grad, piece in zip(others, pieces, strict=True):
                grad.copy_(piece.view_as(grad))
            return buffer

        future: torch.futures.Future[Tensor] = reducing.get_future().then(put_back)
        return future
