"""What is timed and weighed: LDAdamW and its options, torch's AdamW, other projects' optimizers, and two yardsticks."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.common import ROOT, Options, normal
from ldadam_dist import LDAdamW

sys.path.insert(0, str(ROOT / "tests"))
from reference import Reference  # the equations

Build = Callable[[list[nn.Parameter], list[nn.Parameter]], Optimizer]
"""Makes an optimizer for the matrices to be projected, and for the other parameters."""

Giving = Literal["refer", "backward", "copy"]
"""How gradients are given to an optimizer; see `give`."""

BASELINE = "torch AdamW, fused"
SIX_PRODUCTS = "six products, bare"
AUTHORS_WAY = "authors' way"
GAP = 200
"""Steps between two subspaces of GaLore and APOLLO, as in their papers."""


@dataclass(frozen=True)
class Contender:
    """An optimizer to be measured.

    Attributes:
        name: as in the tables.
        build: makes it.
        rank: of its projection, if it has one.
        gap: its first step's work recurs every so many steps; None if it never does.
        yardstick: SIX_PRODUCTS or AUTHORS_WAY if it is one of these, which learn nothing; else empty.
        ldadam: whether the yardsticks of its rank are for it.
        gradients: how they are given to it; see `give`.
    """

    name: str
    build: Build
    rank: int | None = None
    gap: int | None = None
    yardstick: str = ""
    ldadam: bool = False
    gradients: Giving = "refer"


def give(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor], how: Giving = "refer") -> None:
    """Set the gradients of parameters, in their order.

    "refer" to them; have them accumulated by a "backward" pass, which alone may write where errors are; or "copy" them
    to where they were before, as a CUDA graph reads them there.
    """
    if how == "backward":
        optimizer.zero_grad()
        torch.autograd.backward(params, grads)
        return
    for param, grad in zip(params, grads, strict=True):
        if how == "refer":
            param.grad = grad
        elif param.grad is None:
            param.grad = grad.clone()
        else:
            param.grad.copy_(grad)


def giving(options: Mapping[str, Any]) -> Giving:
    """How LDAdamW with these arguments wants its gradients."""
    return "backward" if options.get("error_in_grad") else "refer"


# Others' optimizers


def load_peer(distribution: str, module: str, name: str = "AdamW", whole: bool = False) -> tuple[Any | None, str]:
    """The optimizer of another project, if it is installed.

    GaLore's and APOLLO's packages import bitsandbytes first, for 8-bit variants that are not measured. So only the
    module with the class is run, under an empty package of the same name.

    Args:
        distribution: name on the package index.
        module: dotted name of the module that holds the class, two deep.
        name: of the class.
        whole: import the package as it is.
    Returns:
        the class or None, and what was found in words.
    """
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return None, f"{distribution}: not installed"
    if package not in sys.modules and not whole:
        sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        peer = getattr(importlib.import_module(module), name)
        return peer, f"{distribution} {importlib.metadata.version(distribution)}"
    except Exception as error:  # whatever an old package does on today's torch
        return None, f"{distribution}: installed, but its import failed ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def failure(contender: Contender, device: torch.device, dtype: torch.dtype) -> str:
    """Why a contender does not run on this device, found out with two steps of a small matrix; empty if it does."""
    side = 16 * max(4, (contender.rank or 0) // 16 + 1)  # at least 4096 elements, which 8-bit states want
    try:
        matrices = [nn.Parameter(w) for w in normal([(side, side)], 0.02, device, dtype)]
        others = [nn.Parameter(w) for w in normal([(side,)], 0.02, device, dtype)]
        optimizer = contender.build(matrices, others)
        for _ in range(2):
            grads = normal([(side, side), (side,)], 0.01, device, dtype)
            give(optimizer, [*matrices, *others], grads, contender.gradients)
            optimizer.step()
    except Exception as error:  # whatever another's package, or another version of this one, does
        return _one_line(error)
    return ""


def eight_bit() -> tuple[list[Contender], list[str]]:
    """AdamW with 8-bit states of torchao and of bitsandbytes, and a line on each."""
    found, notes = [], []
    for distribution, module in (("torchao", "torchao.optim"), ("bitsandbytes", "bitsandbytes.optim")):
        peer, line = load_peer(distribution, module, "AdamW8bit", whole=True)
        notes.append(line)
        if peer:
            found.append(Contender(f"{distribution} AdamW8bit", partial(_plain, peer)))
    return found, notes


def low_rank_peers(ranks: Sequence[int]) -> tuple[list[Contender], list[str]]:
    """GaLore and APOLLO, and a line on each."""
    galore, galore_line = load_peer("galore-torch", "galore_torch.adamw")
    apollo, apollo_line = load_peer("apollo-torch", "apollo_torch.apollo")
    found = []
    for rank in ranks:
        if galore:
            build = partial(_grouped, galore, {"rank": rank, "scale": 0.25})
            found.append(Contender(f"GaLoreAdamW, rank {rank}", build, rank, GAP))
        if apollo:
            settings = {"rank": rank, "scale": 1.0, "scale_type": "channel", "proj": "random"}
            found.append(Contender(f"APOLLOAdamW, rank {rank}", partial(_grouped, apollo, settings), rank, GAP))
    return found, [galore_line, apollo_line]


def _plain(make: Callable[..., Optimizer], matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Optimizer:
    return make([*matrices, *others])


def _grouped(
    make: Callable[..., Optimizer], settings: dict[str, Any], matrices: list[nn.Parameter], others: list[nn.Parameter]
) -> Optimizer:
    groups: list[dict[str, Any]] = [{"params": matrices, "update_proj_gap": GAP, "proj_type": "std", **settings}]
    return make(groups + ([{"params": others}] if others else []), no_deprecation_warning=True)


# torch's AdamW and LDAdamW


def adamw() -> list[Contender]:
    """torch's own, fused (the baseline) and foreach."""
    return [
        Contender(BASELINE, partial(_plain, partial(AdamW, fused=True))),
        Contender("torch AdamW, foreach", partial(_plain, partial(AdamW, foreach=True))),
    ]


def ldadamw(rank: int, options: Options, graph: bool = False) -> Contender:
    """LDAdamW with some of its arguments, and perhaps replayed from a graph."""

    def build(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Optimizer:
        groups: list[dict[str, Any]] = [{"params": matrices}]
        if others:
            groups.append({"params": others, "enable_lowrank": False})
        if graph:
            return Replayed(groups, rank=rank, capturable=True, **options.values)
        return LDAdamW(groups, rank=rank, **options.values)

    name = f"LDAdamW, rank {rank}" + (f", {options.text.replace(',', ', ')}" if options.text else "")
    name += ", CUDA graph" if graph else ""
    return Contender(name, build, rank, ldadam=True, gradients="copy" if graph else giving(options.values))


class Replayed(LDAdamW):
    """LDAdamW of which one step is a CUDA graph, captured after three others."""

    graph: torch.cuda.CUDAGraph | None = None
    taken = 0

    def step(self, closure: Any = None) -> None:
        self.taken += 1
        if self.taken <= 3:
            super().step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                super().step()
        self.graph.replay()


def variants(asked: Sequence[Options]) -> list[Options]:
    """LDAdamW as it is, with its error in the gradient if it has that, and with the options that were asked for."""
    known = inspect.signature(LDAdamW.__init__).parameters
    in_grad = [Options.parse("error_in_grad=True")] if "error_in_grad" in known else []
    return [Options(""), *(o for o in in_grad if o not in asked), *asked]


# Yardsticks


class _Yardstick(Optimizer):
    """Does something for each matrix; all other parameters get fused AdamW, as with LDAdamW."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], rank: int) -> None:
        super().__init__([*matrices, *others], {})
        self.work = [self.prepare(param, rank) for param in matrices]
        self.rest = AdamW(others, fused=True) if others else None

    def prepare(self, param: nn.Parameter, rank: int) -> Callable[[], None]:
        """What is to be called at each step for one matrix."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for work in self.work:
            work()
        if self.rest:
            self.rest.step()


class SixProducts(_Yardstick):
    """The products over m×n that a step of LDAdam cannot do without, in float32, and nothing else: UᵀA twice, A Sᵀ,
    and three updates in place, of the error twice and of the weight."""

    def prepare(self, param: nn.Parameter, rank: int) -> Callable[[], None]:
        weight = param.detach().float()
        accumulated = torch.randn_like(weight)
        if param.shape[0] > param.shape[1]:
            weight, accumulated = weight.mT, accumulated.mT
        m, n = weight.shape
        basis, factor = torch.randn(m, rank, device=weight.device), torch.randn(rank, n, device=weight.device)

        def products() -> None:
            basis.mT @ accumulated
            basis.mT @ accumulated
            accumulated @ factor.mT
            accumulated.addmm_(basis, factor)
            accumulated.addmm_(basis, factor, alpha=-1.0)
            weight.addmm_(basis, factor, alpha=1e-6)

        return products


class AuthorsWay(_Yardstick):
    """The paper's equations one after the other for each matrix in float32, a temporary for each: tests/reference.py.

    It starts after its first step, with a random projector, as that step is a full SVD.
    """

    def prepare(self, param: nn.Parameter, rank: int) -> Callable[[], None]:
        left = param.shape[0] <= param.shape[1]
        matrix = Reference(param.detach(), rank, left, dtype=torch.float32)
        m, n = sorted(param.shape)
        matrix.t, matrix.U = 1, torch.linalg.qr(torch.randn(m, rank, device=param.device))[0]
        matrix.M, matrix.V = (torch.zeros(rank, n, device=param.device) for _ in range(2))

        def follow() -> None:
            assert isinstance(param.grad, Tensor)
            matrix.step(param.grad)

        return follow


def yardsticks(rank: int) -> list[Contender]:
    """Both, for LDAdamW of this rank."""
    return [
        Contender(f"{name}, rank {rank}", partial(kind, rank=rank), rank, yardstick=name)
        for name, kind in ((SIX_PRODUCTS, SixProducts), (AUTHORS_WAY, AuthorsWay))
    ]


# All


def contenders(
    ranks: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    asked: Sequence[Options] = (),
    floors: bool = True,
    graphs: bool = False,
) -> tuple[list[Contender], list[str]]:
    """Everything that can be measured here, the baseline first, and a line on what is not torch's or this package's.

    Args:
        ranks: of the low-rank optimizers.
        device, dtype: where and in what each must run.
        asked: further arguments of LDAdamW, one contender for each and each rank.
        floors: with the yardsticks.
        graphs: with LDAdamW replayed from a CUDA graph.
    """
    eight, eight_notes = eight_bit()
    peers, peer_notes = low_rank_peers(ranks)
    own = [ldadamw(rank, options) for rank in ranks for options in variants(asked)]
    if graphs:
        own += [ldadamw(rank, Options(""), graph=True) for rank in ranks]
    found, notes = adamw(), [*eight_notes, *peer_notes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers use what today's torch deprecates
        for contender in (*eight, *own, *peers):
            why = failure(contender, device, dtype)
            if why and contender.name == f"LDAdamW, rank {contender.rank}":
                raise RuntimeError(f"{contender.name} does not run on {device} in {dtype}: {why}")
            if why:
                notes.append(f"{contender.name}: does not run here ({why})")
            else:
                found.append(contender)
    by_rank = [c for rank in ranks for c in (*_of(found, rank), *(yardsticks(rank) if floors else ()))]
    return [*_of(found, None), *by_rank], notes


def _of(found: Sequence[Contender], rank: int | None) -> list[Contender]:
    return [contender for contender in found if contender.rank == rank]
