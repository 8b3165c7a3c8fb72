"""Which slice of which checkpoint tensor lands in which live parameter, learnt from the model's own `load_weights`.

The model is put back, for a moment, into the form in which vLLM loads it (parameters on meta, with their loaders), and
`load_weights` runs once over meta tensors of the checkpoint's names and shapes. Nothing is computed or moved: a
dispatch mode notes each copy from a view of a checkpoint tensor into a view of a parameter. Fused projections,
tensor-parallel slices, padding and tied embeddings need no rule here. """

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from rlhf_worker.weights.plan import ITEMSIZE, Move, RankPlan, View, fills_once
from rlhf_worker.weights.views import dtype_name, placed

# Layers whose parameters stay as they were loaded (on GPU), or are packed from them (on CPU). Others may shuffle,
# quantise or swizzle.
PLAIN = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
PLAIN_EXPERTS = {"TRITON", "BATCHED_TRITON", "CPU"}  # the same of the kernels that compute a layer's experts


@dataclass(slots=True)
class _Parameter:
    """One live parameter, under its first name, with every layer that shares it."""

    name: str
    live: nn.Parameter
    recorded: nn.Parameter  # in the form in which it is loaded; of the layer that owns the first name
    layers: list[nn.Module]
    moves: list[Move] = field(default_factory=list)
    zeros: list[View] = field(default_factory=list)
    trouble: str | None = None  # why its record proves nothing
    fed: set[str] = field(default_factory=set)  # checkpoint tensors that reached it, in whatever way


@dataclass(frozen=True, slots=True)
class Image:
    """A parameter that is gone once its layer is packed: assembled, then packed again."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Recording:
    """The plan, and what carrying it out needs on this rank."""

    plan: RankPlan
    live: dict[str, Tensor]  # parameters written in place
    zeros: list[Tensor]  # padding of those that no checkpoint tensor fills
    images: dict[nn.Module, list[Image]]  # by layer, which is packed when all of its own are there
    repack: list[nn.Module]  # layers whose packed copy follows from parameters written in place
    reload: list[nn.Module]  # layers that only load_weights can fill


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the copies. Tensors derived by computing are known by the checkpoint tensors that went into them."""

    def __init__(self, sources: dict[int, str], targets: dict[int, _Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
        self.targets = targets
        self.derived: dict[int, set[str]] = {}
        self.kept_alive: list[Tensor] = []  # a freed storage's address could come back as another's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        target = self.targets.get(_key(tensors[0])) if tensors and func._schema.is_mutable else None
        if target is not None:
            self._written(func, target, tensors, args)
            return args[0]
        out = func(*args, **(kwargs or {}))
        names = set().union(*(self._names(t) for t in tensors))
        for tensor in (t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)):
            if names and _key(tensor) not in self.sources:
                self.derived.setdefault(_key(tensor), set()).update(names)
                self.kept_alive.append(tensor)
        return out

    def _names(self, tensor: Tensor) -> set[str]:
        key = _key(tensor)
        return {self.sources[key]} if key in self.sources else self.derived.get(key, set())

    def _written(self, func: Any, target: _Parameter, tensors: list[Tensor], args: tuple[Any, ...]) -> None:
        into = tensors[0]
        if not into.numel():
            return
        put = View(
            int(into.storage_offset() - target.recorded.storage_offset()), tuple(into.shape), tuple(into.stride()),
        )
        target.fed |= set().union(*(self._names(t) for t in tensors[1:]))
        if func is torch.ops.aten.zero_.default or (func is torch.ops.aten.fill_.Scalar and args[1] == 0):
            target.zeros.append(put)
        elif func is not torch.ops.aten.copy_.default:
            target.trouble = target.trouble or f"load_weights writes it by {func}"
        elif (source := self.sources.get(_key(tensors[1]))) is None or tensors[1].shape != into.shape:
            target.trouble = target.trouble or "load_weights transforms what it writes"
        else:
            take = View(int(tensors[1].storage_offset()), tuple(tensors[1].shape), tuple(tensors[1].stride()))
            target.moves.append(Move(source, take, target.name, put).simplified())


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def record(model: nn.Module, metas: Sequence[ParamMeta], distrusted: frozenset[str] = frozenset()) -> Recording:
    """The plan of this rank for checkpoint tensors of these names, types and shapes. The model is as it was when this
    returns.

    distrusted: parameters that the plan must leave to load_weights, whatever the record says.
    """
    live = [(layer, dict(layer._parameters)) for layer in model.modules()]
    names = {id(p): name for name, p in model.named_parameters()}
    weights = [(meta.name, torch.empty(meta.shape, dtype=meta.dtype, device="meta")) for meta in metas]
    with _as_loaded(live):
        parameters = _parameters(live, names)
        targets = {
            _key(p): parameters[id(own[name])]
            for layer, own in live for name, p in layer._parameters.items() if p is not None and own[name] is not None
        }
        mode = _Mode({_key(tensor): name for name, tensor in weights}, targets)
        failed = _load(model, weights, mode)
    for parameter in parameters.values():
        if parameter.name in distrusted:
            parameter.trouble = "vLLM holds something else than what it loaded"
    return _recording([*parameters.values()], [layer for layer, _ in live], failed)


@contextmanager
def _as_loaded(live: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Every layer with the parameters that vLLM noted before it first loaded the model, on meta."""
    try:
        for layer, _ in live:
            for name, noted in get_layerwise_info(layer).restore_metadata[0].items():
                if name in layer._parameters and name not in SKIP_TENSORS:
                    layer._parameters[name] = restore_layer_refs(_as_noted(noted), layer)
        yield
    finally:
        for layer, own in live:
            layer._parameters.clear()
            layer._parameters.update(own)


def _as_noted(noted: Tensor) -> Any:
    """A copy on meta with the parameter's own loader: an earlier reload leaves one of vLLM's around it, which puts
    everything off.
    """
    copy: Any = to_meta_tensor(noted)
    if hasattr(copy, "weight_loader"):
        copy.weight_loader = _get_original_loader(copy)
    return copy


def _parameters(live: list[tuple[nn.Module, dict[str, Any]]], names: dict[int, str]) -> dict[int, _Parameter]:
    found: dict[int, _Parameter] = {}
    for layer, own in live:
        for name, parameter in own.items():
            recorded = layer._parameters[name]
            if parameter is not None and id(parameter) in found:
                found[id(parameter)].layers.append(layer)
            elif parameter is not None and recorded is not None:
                found[id(parameter)] = _Parameter(names[id(parameter)], parameter, recorded, [layer])
    return found


def _load(model: Any, weights: list[tuple[str, Tensor]], mode: _Mode) -> dict[str, str]:
    """Run `load_weights`. Returns the tensors that it cannot take on meta, and why; those are loaded for real at each
    sync.
    """
    with disable_mtp_completeness_check(), mode:
        try:
            model.load_weights(iter(weights))
            return {}
        except Exception:
            pass  # one tensor is to blame: find it
        for target in mode.targets.values():
            target.moves, target.zeros, target.fed, target.trouble = [], [], set(), None
        return {
            name: f"{type(e).__name__}: {e}"
            for name, tensor in weights if (e := _load_one(model, name, tensor)) is not None
        }


def _load_one(model: Any, name: str, tensor: Tensor) -> Exception | None:
    try:
        model.load_weights([(name, tensor)])
    except Exception as error:
        return error
    return None


def _recording(parameters: list[_Parameter], layers: list[nn.Module], failed: dict[str, str]) -> Recording:
    troubles = {p.name: trouble for p in parameters if p.fed and (trouble := _trouble(p)) is not None}
    # vLLM reloads a layer whole, so a layer with one such parameter takes the plain ones with it.
    bad = [layer for layer in layers if any(p.name in troubles for p in parameters if layer in p.layers)]
    planned = [p for p in parameters if p.fed and not any(layer in bad for layer in p.layers)]
    reload = dict(failed)
    for p in parameters:
        if p.fed and p not in planned:
            reload |= {name: troubles.get(p.name, f"its layer has {next(iter(troubles))}") for name in p.fed}
    images: dict[nn.Module, list[Image]] = {}
    for p in (p for p in planned if _packed_away(p)):
        images.setdefault(p.layers[0], []).append(Image(p.name, tuple(p.recorded.shape), p.recorded.dtype))
    written = {p.name: p.live.data for p in planned if not _packed_away(p)}
    plan = RankPlan(
        moves=tuple(move for p in planned for move in p.moves),
        dtypes={p.name: dtype_name(p.recorded.dtype) for p in planned},
        reload=reload, kept=tuple(p.name for p in parameters if not p.fed),
    )
    repack = [
        layer for layer in layers
        if _multiplies(layer) and layer not in images and any(layer in p.layers for p in planned if p.name in written)
    ]
    whole = [layer for layer in layers if layer._parameters] if failed else bad
    zeros = [placed(p.live.data, put) for p in planned if p.name in written for put in p.zeros]
    return Recording(plan, written, zeros, images, repack, whole)


def _multiplies(layer: nn.Module) -> bool:
    """Whether it computes with a packed copy; an input embedding has one too, and only looks rows up."""
    return hasattr(layer, "cpu_linear") and type(layer) is not VocabParallelEmbedding


def _packed_away(p: _Parameter) -> bool:
    """vLLM's CPU linear layers and experts keep only a packed copy."""
    if len(p.layers) > 1 or not p.recorded.numel():
        return False
    return _experts(p.layers[0]) == "CPU" or (p.live.numel() == 0 and hasattr(p.layers[0], "cpu_linear"))


def _experts(layer: Any) -> str | None:
    """The kernel that computes them, where the layer has any."""
    backend = getattr(getattr(layer, "quant_method", None), "unquantized_backend", None)
    return None if backend is None else str(backend.name)


def _trouble(p: _Parameter) -> str | None:
    """Why the record of a parameter is not enough to write it; None when every element is proven to be filled exactly
    once.
    """
    for layer in p.layers:
        method = type(getattr(layer, "quant_method", None)).__name__
        if method not in PLAIN and method != "NoneType":
            return f"{method} may store it in another form"
        if _experts(layer) not in {None, *PLAIN_EXPERTS}:
            return (f"{_experts(layer)} may store it in another form: rollout.engineArgs.moe_backend: triton keeps "
                "it as it is")
    if p.trouble is not None:
        return p.trouble
    same = (p.live.shape, p.live.dtype, p.live.stride()) == (p.recorded.shape, p.recorded.dtype, p.recorded.stride())
    if not _packed_away(p) and not (same and p.live.is_contiguous()):
        return (f"it is loaded as {p.recorded.dtype} {tuple(p.recorded.shape)} and kept as {p.live.dtype} "
            f"{tuple(p.live.shape)}")
    if dtype_name(p.recorded.dtype) not in ITEMSIZE:
        return f"{p.recorded.dtype} is not among {', '.join(ITEMSIZE)}"
    if any(step < 1 for move in p.moves for step in (*move.take.stride, *move.put.stride)):
        return "load_weights repeats elements of a tensor"
    if not fills_once([*(move.put for move in p.moves), *p.zeros], p.recorded.numel()):
        return "load_weights does not fill every element exactly once"
    return None
