"""States partition: every element is held once, ranks hold alike, and a step needs no more memory than its window.

Large worlds are those of the fake process group, on which this process is one rank after the other. Parameters are on
the meta device where metadata is enough.
"""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from ldadam_dist import LDAdamW

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "llama_1b.json"
RANK = 128
CUT_IN_COLUMNS = ("o_proj.weight", "down_proj.weight")
"""By tensor parallelism."""
Shape = tuple[int, ...]

# By name: the mesh, and how it cuts the matrices whose rows and whose columns tensor parallelism cuts; vectors are cut
# by FSDP alone.
ROWS = [Shard(0)]
HSDP = [Replicate(), Shard(0)]
LAYOUTS: dict[str, tuple[Shape, list[Any], list[Any]]] = {
    "fsdp 8": ((8,), ROWS, ROWS),
    "fsdp 64": ((64,), ROWS, ROWS),
    "fsdp 256": ((256,), ROWS, ROWS),
    "hsdp 8, 32": ((8, 32), HSDP, HSDP),
    "fsdp 32, tp 8": ((32, 8), [_StridedShard(0, split_factor=8), Shard(0)], [Shard(0), Shard(1)]),
}


def llama_1b() -> nn.Module:
    """On the meta device."""
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**json.loads(CONFIG.read_text())))
    return model


@contextmanager
def rank_of_many(rank: int, mesh_shape: Shape) -> Iterator[DeviceMesh]:
    """This process is one rank of a mesh, the others do not exist: collectives return at once, with any numbers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh_shape))
    # An own name for each, as DTensor remembers equal meshes, with the groups of a world that is gone.
    yield init_device_mesh("cpu", mesh_shape, mesh_dim_names=[f"{rank}.{dim}" for dim in range(len(mesh_shape))])


def exchange_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of `all_to_all_single`: the fake group's refuses a rank that receives and has nothing to send."""


def dtensor(shape: Shape, mesh: DeviceMesh, placements: Sequence[Any], **options: Any) -> nn.Parameter:
    """An uninitialised parameter."""
    local, _ = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    stride = torch.empty(shape, device="meta").stride()
    here = torch.empty(local, **options)
    return nn.Parameter(
        DTensor.from_local(here, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    )


def parameters(shapes: dict[str, Shape], mesh: DeviceMesh, layout: str, device: str) -> dict[str, nn.Parameter]:
    """As FSDP2 and tensor parallelism would make them."""
    _, by_rows, by_columns = LAYOUTS[layout]
    found = {}
    for name, shape in shapes.items():
        placements = by_columns if name.endswith(CUT_IN_COLUMNS) else by_rows
        if len(shape) == 1 and mesh.ndim == 2:
            placements = HSDP if by_rows is HSDP else [Shard(0), Replicate()]
        found[name] = dtensor(shape, mesh, placements, device=device)
    return found


def held(optimizer: LDAdamW, param: Tensor) -> int:
    """Bytes of the storages of a parameter's states; `step` is left out."""
    locals_ = [t.to_local() for key, t in optimizer.state[param].items() if key != "step"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in locals_ if t.numel()}
    return sum(storages.values())


# Balance and bytes


def state_elements(layout: str) -> dict[str, tuple[int, list[int]]]:
    """For one parameter of each kind: state elements on all ranks together, as `placement` tells, and on each."""
    mesh_shape = LAYOUTS[layout][0]
    kinds = {(p.shape, n.endswith(CUT_IN_COLUMNS)): (n, tuple(p.shape)) for n, p in llama_1b().named_parameters()}
    found: dict[str, tuple[int, list[int]]] = {}
    for rank in range(math.prod(mesh_shape)):
        with rank_of_many(rank, mesh_shape) as mesh:
            params = parameters(dict(kinds.values()), mesh, layout, "meta")
            for row in LDAdamW(params.items(), rank=RANK).placement():
                total, each = found.setdefault(row.name, (row.total_bytes // 4, []))
                assert total == row.total_bytes // 4
                each.append(row.state_bytes // 4)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_alike_and_each_element_once(layout: str) -> None:
    (found,) = run_ranks(1, state_elements, layout)
    shapes = {name: tuple(p.shape) for name, p in llama_1b().named_parameters()}
    for name, (total, each) in found.items():
        if len(shapes[name]) == 2:
            m, n = sorted(shapes[name])
            assert total == m * RANK + 2 * RANK * n + m * n
            assert max(each) <= 1.1 * total / len(each), name
        assert sum(each) == total, name


def bytes_after_a_step(layout: str, ranks: Sequence[int]) -> None:
    """Under `fully_shard`, or with tensor parallelism as DTensors, on some ranks of 256."""
    dist.all_to_all_single = exchange_nothing
    mesh_shape, by_rows, _ = LAYOUTS[layout]
    for rank in ranks:
        with rank_of_many(rank, mesh_shape) as mesh:
            model = llama_1b()
            if "tp" in layout:
                params = parameters({n: tuple(p.shape) for n, p in model.named_parameters()}, mesh, layout, "cpu")
            else:
                for part in (*model.model.layers, model):
                    fully_shard(part, mesh=mesh)
                params = dict(model.to_empty(device="cpu").named_parameters())
                assert all(list(p.placements) == by_rows for p in params.values())
            optimizer = LDAdamW(params.items(), rank=RANK)
            before = optimizer.placement()
            for param in params.values():
                nn.init.normal_(param.to_local())
                grad = torch.randn_like(param.to_local())
                param.grad = DTensor.from_local(
                    grad, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
                )
            optimizer.step()
            assert optimizer.skipped_steps == 0
            assert optimizer.placement() == before
            for row in before:
                found = held(optimizer, params[row.name])
                assert found == row.state_bytes, f"{row.name} on rank {rank}: {found} bytes, placed {row.state_bytes}"


@pytest.mark.parametrize("layout", ["fsdp 256", "hsdp 8, 32", "fsdp 32, tp 8"])
def test_states_take_the_bytes_that_placement_tells(layout: str) -> None:
    run_ranks(1, bytes_after_a_step, layout, [0, 255])


def bytes_of_a_small_llama(dtype: torch.dtype) -> dict[str, tuple[Shape, int, int]]:
    """On real ranks: by name the shape, the bytes held here and those of all ranks together."""
    model = models.tiny_llama(dtype)
    for part in (*model.model.layers, model):
        fully_shard(part)
    optimizer = LDAdamW(model.named_parameters(), rank=4)
    before = optimizer.placement()
    for step in range(2):
        optimizer.zero_grad()
        models.llama_loss(model, models.llama_tokens(step).chunk(4)[dist.get_rank()]).backward()
        optimizer.step()
        assert optimizer.placement() == before
    params = dict(model.named_parameters())
    for row in before:
        assert held(optimizer, params[row.name]) == row.state_bytes, row.name
    return {row.name: (row.shape, row.state_bytes, row.total_bytes) for row in before}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_real_ranks_hold_each_element_once(dtype: torch.dtype) -> None:
    found = run_ranks(4, bytes_of_a_small_llama, dtype)
    item, state = dtype.itemsize, 8 if dtype == torch.float64 else 4
    for name, (shape, _, total) in found[0].items():
        m, n = sorted(shape) if len(shape) == 2 else (0, 0)
        assert total == (state * (4 * m + 2 * 4 * n) + item * m * n if m else 2 * item * shape[0]), name
        assert sum(rank[name][1] for rank in found) == total, name
        assert all(rank[name][2] == total for rank in found), name
    assert sum(len(shape) == 2 for shape, _, _ in found[0].values()) == 16


# Memory


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make, until they are freed.

    What an operator needs within itself is not seen.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._followed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._followed:  # else a view, or in place
                    self._followed.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._followed.remove(key)
        self.now -= size


SIDE = 384
"""A quarter of such a matrix is too large to be copied into a batch."""


def peaks(
    number: int, window: int, placement: Any, dtype: torch.dtype, world_size: int, options: dict[str, Any]
) -> list[float]:
    """Transient memory of the first two steps, in windows of float32, with so many equal matrices."""
    found = []
    with rank_of_many(1, (world_size,)) as mesh:
        params = [dtensor((SIDE, SIDE), mesh, [placement], dtype=dtype) for _ in range(number)]
        optimizer = LDAdamW(params, window_elements=window, proj_type="left", **options)
        for _ in range(2):
            for param in params:
                nn.init.normal_(param.to_local())
                grad = torch.randn_like(param.to_local())
                param.grad = DTensor.from_local(grad, mesh, [placement], run_check=False)
            before = sum(held(optimizer, param) for param in params if param in optimizer.state)
            gc.disable()  # what a cycle keeps must count
            with LiveBytes() as live:
                optimizer.step()
            gc.enable()
            created = sum(held(optimizer, param) for param in params) - before
            assert live.now - created <= 4 * number, "something is still held"  # the steps' numbers
            found.append((live.peak - created) / (4 * window))
    return found


def compare_peaks(
    placement: Any, dtype: torch.dtype, elements: int, world_size: int, options: dict[str, Any]
) -> list[list[float]]:
    """With a window of 8 matrices of so many elements, with 8 of them and with 16, and with a quarter of the window."""
    dist.all_to_all_single = exchange_nothing
    gathered = -(-8 // world_size) * SIDE * SIDE if options["communication"] == "gather" else 0
    window = 8 * elements + gathered
    return [
        peaks(number, size, placement, dtype, world_size, options)
        for number, size in ((8, window), (16, window), (8, window // 4))
    ]


def bounded(found: list[list[float]], most: float) -> None:
    usual, more, narrow = found
    assert max(usual) <= most, "windows"
    assert more == pytest.approx(usual, abs=0.01), "a larger model needs as much"
    assert max(narrow) / 4 <= 0.7 * max(usual), "a quarter of the window needs less"


BF16, FP32 = torch.bfloat16, torch.float32
# Windows of float32: with bfloat16 parameters the weight and the error are copied.
PEAKS = [
    *((FP32, "lowrank", ROWS[0], 0.9), (BF16, "lowrank", ROWS[0], 2.4)),
    *((FP32, "lowrank", Shard(1), 1.5), (BF16, "lowrank", Shard(1), 2.4)),
    *((FP32, "gather", ROWS[0], 2.5), (BF16, "gather", ROWS[0], 3.3)),
    *((FP32, "gather", Shard(1), 3.0), (BF16, "gather", Shard(1), 3.8)),
]


@pytest.mark.parametrize(("dtype", "how", "placement", "most"), PEAKS, ids=str)
def test_memory_of_a_step_is_bounded_by_the_window(dtype: Any, how: str, placement: Any, most: float) -> None:
    (found,) = run_ranks(1, compare_peaks, placement, dtype, SIDE * SIDE // 4, 4, {"communication": how, "rank": 8})
    bounded(found, most)


@pytest.mark.parametrize(
    ("dtype", "placement", "elements", "options"),
    [
        (FP32, Shard(1), 96 * SIDE, {"communication": "lowrank", "rank": 96}),  # a factor is larger than a block
        (BF16, Replicate(), SIDE * SIDE, {"communication": "lowrank", "rank": 8}),  # the whole weight is copied
        (FP32, Replicate(), SIDE * SIDE, {"communication": "gather", "rank": 8}),  # the whole update is gathered
    ],
    ids=str,
)
def test_memory_is_bounded_on_many_ranks(dtype: Any, placement: Any, elements: int, options: dict[str, Any]) -> None:
    (found,) = run_ranks(1, compare_peaks, placement, dtype, elements, 64, options)
    bounded(found, 10.0)
