"""What `Traffic` counts: every operator on the fake process group, where this process is number 1 of 4, and real gloo.

The expected numbers are written out by hand: all tensors are float32, lengths tell which of them was counted.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldadam_dist.tables import format_bytes, format_percent, table
from ldadam_dist.traffic import _KINDS, _NAMESPACES, _SENDS_NOTHING, Collective, Traffic

# Newer names of the same collectives, where torch has them: the old ones warn there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

c10d = torch.ops.c10d
funcol = torch.ops._c10d_functional
funcol_autograd = torch.ops._c10d_functional_autograd
WORLD = "0"
"""Name of the default group."""


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Four processes, of which only number 1 exists; collectives return at once and leave any numbers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    assert dist.group.WORLD is not None
    assert dist.group.WORLD.group_name == WORLD
    yield
    dist.destroy_process_group()


def f(*shape: int) -> Tensor:
    return torch.ones(shape)


def fs(count: int, *shape: int) -> list[Tensor]:
    return [f(*shape) for _ in range(count)]


def counted(records: list[Collective]) -> list[tuple[str, int]]:
    return [(c.kind, c.elements) for c in records]


def coalesced(function: Callable[..., object], calls: list[tuple[Tensor, ...]]) -> None:
    with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu")):
        for tensors in calls:
            function(*tensors)


def boxed() -> Any:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.boxed()


# By kind and variant: what to call, the elements counted and those of the largest tensor.
CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "all_reduce": (lambda: dist.all_reduce(f(3, 4)), 24, 12),
    "all_gather": (lambda: dist.all_gather(fs(4, 3), f(3)), 12, 12),
    "all_gather single": (lambda: all_gather_single(f(12), f(3)), 12, 12),
    "all_gather empty": (lambda: all_gather_single(f(0), f(0)), 0, 0),
    "reduce_scatter": (lambda: dist.reduce_scatter(f(3), fs(4, 3)), 12, 12),
    "reduce_scatter single": (lambda: reduce_scatter_single(f(3), f(12)), 12, 12),
    "broadcast": (lambda: dist.broadcast(f(3), 0), 3, 3),
    "reduce": (lambda: dist.reduce(f(3), 0), 3, 3),
    "gather elsewhere": (lambda: dist.gather(f(3), None, 0), 12, 12),
    "gather root": (lambda: dist.gather(f(3), fs(4, 3), 1), 12, 12),
    "scatter elsewhere": (lambda: dist.scatter(f(3), None, 0), 12, 12),
    "scatter root": (lambda: dist.scatter(f(3), fs(4, 3), 1), 12, 12),
    # It receives 3 elements of each process, and sends 1, 2 or 5 to each.
    "all_to_all": (lambda: dist.all_to_all(fs(4, 3), fs(4, 1)), 12, 12),
    "all_to_all receives more": (lambda: dist.all_to_all_single(f(12), f(8), [3] * 4, [2] * 4), 12, 12),
    "all_to_all sends more": (lambda: dist.all_to_all_single(f(12), f(20), [3] * 4, [5] * 4), 20, 20),
    "send": (lambda: dist.send(f(3), 0), 3, 3),
    "recv": (lambda: dist.recv(f(3), 0), 3, 3),
    "recv from any": (lambda: c10d.recv_any_source_([f(3)], boxed(), 0), 3, 3),
    # Two tensors in one call, of 3 and 5 elements on this process.
    "all_reduce coalesced": (lambda: coalesced(dist.all_reduce, [(f(3),), (f(5),)]), 2 * (3 + 5), 5),
    "all_gather coalesced": (lambda: coalesced(all_gather_single, [(f(12), f(3)), (f(20), f(5))]), 32, 20),
    "reduce_scatter coalesced": (lambda: coalesced(reduce_scatter_single, [(f(3), f(12)), (f(5), f(20))]), 32, 20),
    "all_gather lists": (lambda: c10d.allgather_coalesced_([[f(3), f(5)]] * 4, [f(3), f(5)], boxed()), 32, 20),
    # Functional collectives, of which DTensor's are made.
    "all_reduce functional": (lambda: funcol.all_reduce(f(3), "sum", WORLD), 6, 3),
    "all_reduce in place": (lambda: funcol.all_reduce_(f(3), "sum", WORLD), 6, 3),
    "all_reduce list": (lambda: funcol.all_reduce_coalesced([f(3), f(5)], "sum", WORLD), 2 * (3 + 5), 5),
    "all_gather functional": (lambda: funcol.all_gather_into_tensor(f(3), 4, WORLD), 12, 12),
    "all_gather out": (lambda: funcol.all_gather_into_tensor_out(f(3), 4, WORLD, out=f(12)), 12, 12),
    "all_gather list": (lambda: funcol.all_gather_into_tensor_coalesced([f(3), f(5)], 4, WORLD), 32, 20),
    "all_gather autograd": (lambda: funcol_autograd.all_gather_into_tensor(f(3), 4, WORLD), 12, 12),
    "reduce_scatter functional": (lambda: funcol.reduce_scatter_tensor(f(12), "sum", 4, WORLD), 12, 12),
    "reduce_scatter list": (lambda: funcol.reduce_scatter_tensor_coalesced([f(12), f(20)], "sum", 4, WORLD), 32, 20),
    "all_to_all functional": (lambda: funcol.all_to_all_single(f(8), [3] * 4, [2] * 4, WORLD), 12, 12),
    "broadcast functional": (lambda: funcol.broadcast(f(3), 0, WORLD), 3, 3),
    # From a cut of rows to one of columns: (3, 8) to (12, 2).
    "all_to_all of DTensor": (lambda: torch.ops._dtensor.shard_dim_alltoall(f(3, 8), 0, 1, WORLD), 24, 24),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_counts_once_and_as_documented(fake_group: None, name: str) -> None:
    issue, elements, largest = CASES[name]
    with Traffic() as traffic:
        result = issue()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                funcol.wait_tensor(tensor)
    expected = Collective(name.split()[0], "default_pg", 4, torch.float32, elements, 4 * elements, largest)
    assert traffic.records == [expected]


def test_barriers_and_arithmetic_count_nothing(fake_group: None) -> None:
    with Traffic() as traffic:
        dist.barrier()
        f(3) @ f(3)
        f(4).view(torch.uint8)  # which names its type
    assert traffic.records == []
    assert (traffic.calls, traffic.elements, traffic.bytes) == (0, 0, 0)
    assert str(traffic).splitlines()[-1].split() == ["total", "0", "0", "0", "B"]


def test_every_operator_of_this_torch_is_known() -> None:
    found = {
        name.strip("_")
        for namespace, _, name in (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
        if namespace in _NAMESPACES
    }
    # Several sends and receives, counted under this name; and one that takes no tensor.
    assert found - set(_KINDS) - _SENDS_NOTHING <= {"batch_p2p_ops", "mesh_get_process_group"}


def test_an_unknown_operator_counts_under_its_own_name(fake_group: None) -> None:
    with torch.library._scoped_library("c10d", "FRAGMENT") as library:
        library.define("swap_halves_(Tensor[] tensors, str note, Tensor? other=None) -> ()")
        library.impl("swap_halves_", lambda tensors, note, other=None: None, "CompositeExplicitAutograd")
        with Traffic() as traffic:
            c10d.swap_halves_([f(3), f(5)], "x", torch.ones(7, dtype=torch.float64))
            c10d.swap_halves_([], "no tensors")
    # 3 + 5 elements of float32, 7 of float64.
    assert traffic.records == [Collective("swap_halves_", "unknown", 0, torch.float32, 15, 4 * 8 + 8 * 7, 7)]


def test_groups_are_told_apart(fake_group: None) -> None:
    pair = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert isinstance(pair, dist.ProcessGroup)
    with Traffic() as traffic:
        dist.gather(f(3), group=pair, dst=0)
        dist.all_reduce(f(3), group=mesh.get_group("tp"))
    found = [(c.group, c.group_size, c.elements) for c in traffic.records]
    assert found == [(pair.group_name, 2, 6), ("mesh_tp", 2, 6)]


def test_a_torch_that_does_not_unbox_groups_still_counts(fake_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist.ProcessGroup, "unbox")
    with Traffic() as traffic:
        dist.all_reduce(f(3))
    assert [(c.group, c.group_size, c.elements) for c in traffic.records] == [("unknown", 0, 6)]
    assert str(traffic).splitlines()[2].split()[:3] == ["all_reduce", "unknown", "?"]


def test_the_table(fake_group: None) -> None:
    with Traffic() as traffic:
        for _ in range(2):
            dist.all_reduce(torch.ones(1024, dtype=torch.bfloat16))
        dist.broadcast(f(3), 0)
        work = dist.all_reduce(f(256), async_op=True)
        work.wait()
    assert str(traffic) == (
        "collective  group       processes  dtype     calls  elements     bytes\n"
        "----------------------------------------------------------------------\n"
        "all_reduce  default_pg          4  bfloat16      2     4,096   8.0 KiB\n"
        "all_reduce  default_pg          4  float32       1       512   2.0 KiB\n"
        "broadcast   default_pg          4  float32       1         3      12 B\n"
        "----------------------------------------------------------------------\n"
        "total                                            4     4,611  10.0 KiB"
    )


def test_objects_count_as_the_tensors_they_are_pickled_into(fake_group: None) -> None:
    sent = {"a": 1}
    with Traffic() as traffic:
        dist.broadcast_object_list([sent], 1)
    # The length, an int64, and then the bytes.
    length = len(pickle.dumps(sent))
    found = [(c.dtype, c.elements, c.bytes) for c in traffic.records]
    assert found == [(torch.int64, 1, 8), (torch.uint8, length, length)]


def test_a_collective_that_fails_is_not_counted(fake_group: None) -> None:
    with Traffic() as traffic, pytest.raises(RuntimeError, match="size of tensor"):
        dist.all_gather([*fs(3, 3), f(2)], f(3))
    assert traffic.records == []


class Seen(TorchDispatchMode):
    """A user's own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_around_and_within(fake_group: None) -> None:
    mesh = init_device_mesh("cpu", (4,))
    rows, partial = DTensor.from_local(f(3, 8), mesh, [Shard(0)]), DTensor.from_local(f(5), mesh, [Partial()])
    outer, inner, mode = Traffic(), Traffic(), Seen()
    with outer, mode, inner:
        dist.all_reduce(f(3))
        rows.full_tensor()  # (12, 8)
        partial.relu()  # sums within the operation
    with mode:
        dist.all_reduce(f(3))
    assert {"c10d.allreduce_.default", "_c10d_functional.all_gather_into_tensor.default"} <= set(mode.names)
    for traffic in (outer, inner):
        assert counted(traffic.records) == [("all_reduce", 6), ("all_gather", 96), ("all_reduce", 10)]
    with outer:
        dist.all_reduce(f(3))
    assert (outer.calls, inner.calls) == (4, 3)


class Reducing(Tensor):
    """A tensor that sums itself over all processes in each operation."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Reducing:
        made: Reducing = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.inner if isinstance(a, Reducing) else a for a in args]
        dist.all_reduce(plain[0])
        return func(*plain, **(kwargs or {}))


def test_collectives_within_a_tensor_subclass_count(fake_group: None) -> None:
    with Traffic() as outer, Traffic() as inner:
        Reducing(f(3)) + 1
    assert [c.elements for c in outer.records] == [c.elements for c in inner.records] == [6]


def test_fake_tensors_count_once(fake_group: None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, Traffic() as within:
        dist.all_reduce(torch.empty(3))
        known = torch.empty(5)
    with Traffic() as around, mode:
        dist.all_reduce(known)
    assert (within.elements, within.calls, around.elements, around.calls) == (6, 1, 10, 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_collectives_of_a_backward_pass_count(fake_group: None, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    threads = []

    def hook(grad: Tensor) -> None:
        threads.append(threading.get_ident())
        dist.all_reduce(grad.clone())

    x = torch.ones(3, device=device, requires_grad=True)
    x.register_hook(hook)
    y = x.sum()
    with Traffic() as traffic:
        y.backward()
    assert counted(traffic.records) == [("all_reduce", 6)]
    assert (threads[0] != threading.get_ident()) == (device == "cuda"), "autograd has a thread for a CUDA device"


def test_compiled_functions_stay_compiled_and_count(fake_group: None) -> None:
    graphs: list[Any] = []

    @torch.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    def step(x: Tensor) -> Tensor:
        x = x * 2
        dist.all_reduce(x)
        return x + 1

    for _ in range(2):
        with Traffic() as traffic:
            step(f(3))
        assert counted(traffic.records) == [("all_reduce", 6)]
    if hasattr(TorchDispatchMode, "ignore_compile_internals"):
        assert len(graphs) == 1


def on_two_processes() -> dict[str, Any]:
    records = {}

    def measure(name: str, code: Callable[[], Any]) -> Any:
        with Traffic() as traffic:
            result = code()
        records[name] = traffic.records
        return result

    mine = dist.get_rank()
    x = torch.full((3,), 1.0 + mine)
    measure("all_reduce", lambda: dist.all_reduce(x))
    assert x.tolist() == [3.0] * 3, "the operation is left as it is"
    measure("reduce", lambda: dist.reduce(f(3), 0))
    measure("broadcast", lambda: dist.broadcast(f(3), 1))
    measure("gather", lambda: dist.gather(f(3), fs(2, 3) if mine == 0 else None, 0))
    measure("scatter", lambda: dist.scatter(f(3), fs(2, 3) if mine == 1 else None, 1))
    objects: list[Any] = [None, None]
    measure("objects", lambda: dist.all_gather_object(objects, mine))
    assert objects == [0, 1]

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    rows = DTensor.from_local(torch.full((3, 4), float(mine)), mesh, [Shard(0)])
    whole = measure("rows to whole", lambda: rows.redistribute(mesh, [Replicate()]).to_local() * 1)
    assert whole[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    partial = DTensor.from_local(f(6, 4), mesh, [Partial()])
    measure("partial to whole", lambda: partial.redistribute(mesh, [Replicate()]).to_local() * 1)
    measure("partial to rows", lambda: partial.redistribute(mesh, [Shard(0)]).to_local() * 1)

    sharded = nn.Linear(8, 4)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
    out = measure("fully_shard forward", lambda: sharded(f(2, 8)).sum())
    measure("fully_shard backward", out.backward)
    replicated = DistributedDataParallel(nn.Linear(8, 4))
    out = measure("ddp forward", lambda: replicated(f(2, 8)).sum())
    measure("ddp backward", out.backward)
    return records


def test_gloo() -> None:
    counts = run_ranks(2, on_two_processes)
    assert counts[0] == counts[1], "both processes count the same, root or not"
    found = {name: counted(records) for name, records in counts[0].items()}
    length = len(pickle.dumps(0))
    assert found == {
        "all_reduce": [("all_reduce", 6)],
        "reduce": [("reduce", 3)],
        "broadcast": [("broadcast", 3)],
        "gather": [("gather", 6)],
        "scatter": [("scatter", 6)],
        "objects": [("all_gather", 2), ("all_gather", 2 * length)],
        # (6, 4) elements
        "rows to whole": [("all_gather", 24)],
        "partial to whole": [("all_reduce", 48)],
        "partial to rows": [("reduce_scatter", 24)],
        # A weight of (4, 8) and a bias of 4: 36 elements, gathered, gathered again and their gradients reduced.
        "fully_shard forward": [("all_gather", 36)],
        "fully_shard backward": [("all_gather", 36), ("reduce_scatter", 36)],
        "ddp forward": [],
        "ddp backward": [("all_reduce", 72)],
    }
    assert {c.group for c in counts[0]["fully_shard forward"]} <= {"default_pg", "mesh_dp"}
    found_in = {(c.group_size, c.dtype) for records in counts[0].values() for c in records}
    assert found_in == {(2, torch.float32), (2, torch.int64), (2, torch.uint8)}


def test_a_table_needs_a_header_and_one_alignment_for_each_column() -> None:
    lines = table([("name", "n"), ("a", "10"), ("bcdef", "")], "<>")
    assert lines == ["name    n", "---------", "a      10", "bcdef"]
    with pytest.raises(ValueError, match=r"lines of 1 cells, found 2\. Pass a header first"):
        table([("name", "n")], "<")
    with pytest.raises(ValueError, match=r"found 1, 2"):
        table([("name", "n"), ("a",)], "<<")
    with pytest.raises(ValueError, match=r"found no line"):
        table([], "<<")


def test_numbers_are_short() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 2**30, 3 * 2**40, 2048 * 2**40)] == [
        *("0 B", "1023 B", "1.5 KiB", "5.0 MiB", "1.0 GiB", "3.0 TiB", "2048.0 TiB"),
    ]
    assert format_percent(1, 8) == "12.5 %"
    assert format_percent(0, 0) == "-"
