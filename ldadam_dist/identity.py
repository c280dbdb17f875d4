"""What each parameter of a model is: the weight of a linear layer, stacked experts, an embedding, the head, ...

The answer comes from the modules that hold the parameter, not from its name alone. Nothing here imports a library
whose modules it recognises, and shapes are global, so models on the meta device, `fully_shard`-ed models and models
wrapped by DistributedDataParallel or torch.compile are all read alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ldadam_dist.rules import global_shape

HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "output", "output_layer", "output_projection"}
    | {"classifier", "score", "embed_out", "qa_outputs"}
)
"""Names of an output projection, where the model has no `get_output_embeddings()` to ask; see `_head_params`."""

_ATTENTION_WEIGHTS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
_PLAIN_TENSORS = frozenset({"Parameter", "Tensor", "DTensor", "FakeTensor", "Buffer"})
_EXPERTS = re.compile(r"expert|^moe|moe$", re.IGNORECASE)


@dataclass(frozen=True)
class ParamInfo:
    """One parameter, tied uses included.

    name: the first of its names, without the prefixes that wrappers add.
    shape: the global shape.
    kind: what it is: "linear" for the weight of a linear layer, "experts" for a stack of them, "convolution", ...;
        the reason it gets AdamW, if it does.
    flatten: whether it is one matrix (shape[0], rest), as convolutions are, and not a stack of matrices.
    decay: whether weight decay is meant for it (matrices and embeddings, not biases, norms and vectors).
    names: every name a pattern may match: of the parameter and of the modules that hold it.
    exact_names: names by which the user can mean just this parameter; see `selection.decide`.
    """

    name: str
    param: nn.Parameter
    shape: tuple[int, ...]
    kind: str
    flatten: bool
    decay: bool
    names: frozenset[str]
    exact_names: frozenset[str]

    @property
    def plain(self) -> bool:
        """Whether it holds real numbers, stored as they are."""
        return self.param.is_floating_point() and _tensor_class(self.param) is None


@dataclass(frozen=True)
class _Use:
    module_name: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute

    @property
    def is_bias(self) -> bool:
        return "bias" in self.attribute


def inspect_model(model: nn.Module) -> list[ParamInfo]:
    """Every parameter of the model once, frozen ones included, in the order of `model.named_parameters()`."""
    modules = list(_walk(model))
    for name, module in modules:
        if _is_a(module, "FullyShardedDataParallel"):
            raise ValueError(
                f"module {name or 'model'!r} is wrapped by FullyShardedDataParallel (FSDP1), which flattens parameters "
                "to vectors that cut matrices anywhere; found no matrix to project. Use "
                "torch.distributed.fsdp.fully_shard (FSDP2), which shards each parameter by itself."
            )

    uses: dict[int, list[_Use]] = {}
    params: dict[int, nn.Parameter] = {}
    for name, module in modules:
        for attribute, param in module._parameters.items():
            if param is not None:
                params[id(param)] = param
                uses.setdefault(id(param), []).append(_Use(name, module, attribute))

    heads = _head_params(modules)
    adapters = _adapter_params(modules)
    return [
        _inspect(param, uses[key], is_head=key in heads, is_adapter=key in adapters) for key, param in params.items()
    ]


def _inspect(param: nn.Parameter, uses: list[_Use], *, is_head: bool, is_adapter: bool) -> ParamInfo:
    first = uses[0]
    if isinstance(param, nn.UninitializedParameter):
        raise ValueError(
            f"parameter {first.name!r} has no shape yet: it belongs to a lazy module. Run one forward pass first."
        )
    shape = global_shape(param)
    names, exact_names = set(), set()
    for use in uses:
        names |= {use.name, use.module_name} - {""}
        exact_names.add(use.name)
        if not use.is_bias:  # who names a module means its weights: 'experts', but not their biases (number, columns)
            exact_names |= {use.module_name, use.module_name.rpartition(".")[2]} - {""}
        if use.attribute not in ("weight", "bias"):
            exact_names.add(use.attribute)
    return ParamInfo(
        name=first.name,
        param=param,
        shape=shape,
        kind=_kind(param, shape, uses, is_head=is_head, is_adapter=is_adapter),
        flatten=len(shape) > 2 and any(_is_convolution(use.module) for use in uses),
        decay=len(shape) > 1 and not any(_is_norm(use.module) or use.is_bias for use in uses),
        names=frozenset(names),
        exact_names=frozenset(exact_names),
    )


def _kind(param: nn.Parameter, shape: tuple[int, ...], uses: list[_Use], *, is_head: bool, is_adapter: bool) -> str:
    """What the parameter is; see `ParamInfo`.

    One use decides for all: a weight shared by an embedding and the head is an embedding.
    """
    if is_adapter:
        return "adapter"
    if any(_is_embedding(use.module) for use in uses):
        tied = any(not _is_embedding(use.module) for use in uses)
        return "embedding, tied" if tied else "embedding"
    if any(_is_norm(use.module) for use in uses):
        return "norm"
    if uses[0].is_bias:
        return "bias"
    if len(shape) < 2:
        return "vector"
    if not param.is_floating_point():
        return "quantised" if not param.is_complex() else "complex"
    tensor_class = _tensor_class(param)
    if tensor_class is not None:
        return f"stored as {tensor_class}"
    if any(_is_convolution(use.module) for use in uses):
        return "convolution"
    if len(shape) == 3 and shape[0] > 1 and all(_holds_experts(use) for use in uses):
        return "experts"
    if len(shape) > 2:
        return f"{len(shape)}-D"
    if is_head:
        return "head"
    for use in uses:
        if not _is_linear_weight(use):
            return f"in {type(use.module).__name__}"
    return "linear"


def _is_linear_weight(use: _Use) -> bool:
    if isinstance(use.module, nn.MultiheadAttention):
        return use.attribute in _ATTENTION_WEIGHTS
    is_linear = isinstance(use.module, nn.Linear) or _is_a(use.module, "Conv1D", package="transformers")
    return is_linear and use.attribute == "weight"


def _holds_experts(use: _Use) -> bool:
    """Whether three-dimensional weights of this module are stacked experts (number, rows, columns).

    Its own name, its class or a base class must say "expert" (MixtralExperts, GroupedExperts, JetMoeParallelExperts),
    or begin or end with "moe" (MoELayer, block_sparse_moe). "Moe" in the middle tells nothing: families of models have
    it in the name of every class (Qwen3MoeAttention). Nor does (1, n, d), as of the positions of a model named MoEViT.
    """
    names = [use.module_name.rpartition(".")[2], *(c.__name__ for c in type(use.module).__mro__)]
    return any(_EXPERTS.search(name) for name in names)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _tensor_class(param: nn.Parameter) -> str | None:
    """Name of the tensor subclass that stores the values in its own way (quantised, for example), if any."""
    name = type(param).__name__
    return None if name in _PLAIN_TENSORS else name


def _is_a(module: nn.Module, class_name: str, package: str = "") -> bool:
    """isinstance by name, for classes of libraries that are not imported here."""
    return any(c.__name__ == class_name and c.__module__.startswith(package) for c in type(module).__mro__)


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the whole tree; shared modules under each of their names, wrappers without theirs."""
    yield name, module
    wraps_module = any(
        _is_a(module, wrapper) for wrapper in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")
    )
    for child_name, child in module._modules.items():
        if child is None:
            continue
        if child_name in ("_orig_mod", "_checkpoint_wrapped_module") or (wraps_module and child_name == "module"):
            yield from _walk(child, name)
        else:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name)


def _head_params(modules: list[tuple[str, nn.Module]]) -> set[int]:
    """ids of the weights of the output projection.

    A model that has `get_output_embeddings()` says which it is. For others it is the last linear layer at or below a
    module named as in `HEAD_NAMES` that is not inside a numbered layer: 'lm_head', 'classifier.out_proj', 'heads.head',
    but not 'layers.3.output.dense'.
    """
    found: set[int] = set()
    for _, module in modules:
        get = getattr(module, "get_output_embeddings", None)
        if not callable(get):
            continue
        try:
            head = get()
        except (NotImplementedError, AttributeError):  # how libraries say that there is none
            continue
        if isinstance(head, nn.Module):
            found |= {id(param) for param in head.parameters()}
    if found:
        return found

    last: dict[str, int] = {}  # a head's name → the last linear weight below it
    for name, module in modules:
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        for depth, part in enumerate(parts):
            if part.isdigit():
                break
            if part in HEAD_NAMES:
                last[".".join(parts[: depth + 1])] = id(module.weight)
                break
    return set(last.values())


def _adapter_params(modules: list[tuple[str, nn.Module]]) -> set[int]:
    """ids of LoRA factors and other adapters: those that PEFT's layers list, and names that begin with lora_."""
    found: set[int] = set()
    for name, module in modules:
        if any(part.startswith("lora_") for part in name.split(".")):
            found |= {id(param) for param in module.parameters(recurse=False)}
        found |= {id(param) for attribute, param in module._parameters.items() if attribute.startswith("lora_")}
        for attribute in getattr(module, "adapter_layer_names", ()):
            if attribute == "modules_to_save":  # whole layers, trained beside the adapters
                continue
            value = getattr(module, attribute, None)
            if isinstance(value, nn.Module):
                found |= {id(param) for param in value.parameters()}
            elif isinstance(value, torch.Tensor):
                found.add(id(value))
    return found
