"""An engine rank's end of a sync: vLLM's weight-transfer engine `planned`. Weights land where the model computes with
them.

`plan_of` and `checksums` run in a vLLM worker process by its collective RPC, pickled. A sync does not take that way: a
thread here waits for the trainer's order. Nothing computes meanwhile, because the engine is held (its actor's `pause`).
"""

import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_worker.weights import checksum, mapped, wire
from rlhf_worker.weights.compare import EngineSums
from rlhf_worker.weights.control import Member
from rlhf_worker.weights.plan import Hop, Piece, RankPlan, to_all, waves
from rlhf_worker.weights.recorder import Image, Recording, record
from rlhf_worker.weights.terms import Order, Terms
from rlhf_worker.weights.views import copy_all, placed


@dataclass
class PlannedInitInfo(WeightTransferInitInfo):
    terms: bytes  # pickled Terms
    engine: int  # which of the group's engines this is


@dataclass
class PlannedUpdateInfo(WeightTransferUpdateInfo):
    order: Order


class PlannedWeightTransferEngine(WeightTransferEngine[PlannedInitInfo, PlannedUpdateInfo]):
    init_info_cls = PlannedInitInfo
    update_info_cls = PlannedUpdateInfo
    recording: Recording
    terms: Terms
    held: list[dict[str, Tensor]] | None = None  # by trainer rank: its memory
    channel: wire.Channel | None = None
    member: Member | None = None
    copies: tuple[list[Tensor], list[Tensor]] = ([], [])  # from the trainer's memory into live parameters
    waves: Sequence[wire.Wave] = ()
    packed_sums: dict[str, int]

    def plan(self, metas: Sequence[ParamMeta], distrusted: frozenset[str]) -> RankPlan:
        self.shutdown()
        self.recording = record(self.model, metas, distrusted)
        return self.recording.plan

    @property
    def rank(self) -> int:
        return int(self.parallel_config.rank)

    def init_transfer_engine(self, init_info: PlannedInitInfo) -> None:
        self.terms = pickle.loads(init_info.terms)
        self.needs = self.terms.pieces(self.recording.plan)
        self.me = self.terms.group.number(init_info.engine, self.rank)
        if self.terms.handles is not None:
            self._open(self.terms.handles)
            if self.terms.transient:
                self._let_go()
        else:
            self._join()
        self.member = Member(self.terms.control, self.me, self.terms.deadline_seconds)
        self.serving = threading.Thread(target=self._serve, args=(self.member,), name="weight sync", daemon=True)
        self.serving.start()

    def _join(self) -> None:
        address = wire.Address(self.terms.address, self.me, self.terms.group.size, self.terms.deadline_seconds)
        self.channel = wire.join(address, self.device)
        self.hops = waves(self.needs, self.rank, self.terms.group, self.terms.stage_limit)
        self.stage = wire.make_stage(self.hops, self.me, self.device)

    @torch.no_grad()
    def _serve(self, member: Member) -> None:
        """Until the trainer hangs up."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        while (order := member.next()) is not None:
            failure: Exception | None = None
            try:
                self.receive_weights(PlannedUpdateInfo(order))
            except Exception as error:
                failure = error
            member.answer(failure)

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: PlannedUpdateInfo) -> None:
        order = update_info.order
        if order.handles is not None:
            self._open(pickle.loads(order.handles))
        self.packed_sums.clear()
        for zeros in self.recording.zeros:
            zeros.zero_()  # a deep sleep forgets them
        with set_current_vllm_config(self.vllm_config):
            if self.channel is None:
                self._read(order.proof)
            else:
                self._receive(self.channel, order.proof)
            for layer in self.recording.repack:
                _process(layer)
            if self.recording.plan.reload:
                self._reload()
        if self.terms.transient:
            self._let_go()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        """Also ends a sync that is under way."""
        if self.member is not None:
            self.member.close()
            self.serving.join()
        if self.channel is not None:
            self.channel.close()
        self._let_go()
        self.member, self.channel, self.waves = None, None, ()
        self.packed_sums = {}

    # Memory that this process sees.

    def _open(self, handles: Sequence[Mapping[str, mapped.Handle]]) -> None:
        self._let_go()  # the old mapping goes before the new one comes
        self.held = [mapped.open_all(own, self.device, self.me - self.terms.group.trainers) for own in handles]
        direct = [piece for piece in self.needs if piece.move.target in self.recording.live]
        self.copies = ([self._put(piece) for piece in direct], [self._take(piece) for piece in direct])
        self.parts: dict[str, list[Piece]] = {
            image.name: [] for images in self.recording.images.values() for image in images
        }
        for piece in self.needs:
            if piece.move.target in self.parts:
                self.parts[piece.move.target].append(piece)

    def _let_go(self) -> None:
        self.held, self.copies = None, ([], [])

    def _take(self, piece: Piece) -> Tensor:
        assert self.held is not None
        return placed(self.held[piece.rank][piece.move.source], piece.move.take)

    def _put(self, piece: Piece) -> Tensor:
        return placed(self.recording.live[piece.move.target], piece.move.put)

    def _read(self, proof: bool) -> None:
        copy_all(*self.copies)
        for layer, images in self.recording.images.items():
            # experts may be computed with as they are, by a kernel that packs nothing
            lend = hasattr(layer, "cpu_linear")
            self._pack(layer, {image.name: self._image(image, self.parts[image.name], lend) for image in images}, proof)

    def _image(self, image: Image, parts: Sequence[Piece], lend: bool) -> Tensor:
        """A parameter as it is before it is packed: the trainer's own memory where that may be lent and has the same
        form, else assembled.
        """
        if lend and len(parts) == 1 and parts[0].move.take.contiguous and (
            held := self._take(parts[0])
        ).dtype == image.dtype and held.numel() == prod(image.shape):
            return held.view(image.shape)
        made = torch.zeros(image.shape, dtype=image.dtype)
        for part in parts:
            placed(made, part.move.put).copy_(self._take(part))
        return made

    def _pack(self, layer: nn.Module, images: Mapping[str, Tensor], proof: bool) -> None:
        for name, image in images.items():
            if proof:
                self.packed_sums[name] = int(checksum.whole(image))
            setattr(layer, name.rpartition(".")[2], nn.Parameter(image, requires_grad=False))
        _process(layer)

    # Memory at the other end of a link.

    def _receive(self, channel: wire.Channel, proof: bool) -> None:
        made = {
            image.name: torch.zeros(image.shape, dtype=image.dtype) for images in self.recording.images.values()
            for image in images
        }
        if made or not self.waves:
            targets = {**self.recording.live, **made}
            self.waves = [self._wave(hops, self.stage[number % 2], targets) for number, hops in enumerate(self.hops)]
        wire.run(channel, self.waves, self._given_up)
        for layer, images in self.recording.images.items():
            self._pack(layer, {image.name: made[image.name] for image in images}, proof)

    def _given_up(self) -> bool:
        return self.member is None or self.member.hung_up()

    def _wave(self, hops: Sequence[Hop], stage: Tensor, targets: Mapping[str, Tensor]) -> wire.Wave:
        def put(piece: Piece) -> Tensor:
            return placed(targets[piece.move.target], piece.move.put)

        return wire.make_wave(hops, self.me, put, lambda piece: targets[piece.move.target].dtype, stage)

    # What load_weights must do itself.

    def _reload(self) -> None:
        """Whole tensors, one at a time, through the model's own loader; vLLM processes a layer as soon as it is
        complete.
        """
        for layer in self.recording.reload:
            initialize_layerwise_reload(layer)
        with disable_mtp_completeness_check():
            for meta in (meta for meta in self.terms.metas if meta.name in self.recording.plan.reload):
                self.model.load_weights([(meta.name, self._whole(meta))])
        for layer in self.recording.reload:
            finalize_layerwise_reload(layer, self.model_config)

    def _whole(self, meta: ParamMeta) -> Tensor:
        dtype = self.model_config.dtype
        made = torch.empty(meta.shape, dtype=dtype, device=self.device)
        parts = self.terms.whole(meta, dtype)
        if self.channel is not None:
            hops = to_all(parts, [self.me])
            wire.run(
                self.channel, [self._wave(hops, wire.make_stage([hops], self.me, self.device)[0], {meta.name: made})],
                self._given_up,
            )
            return made
        for part in parts:
            placed(made, part.move.put).copy_(self._take(part))
        return made

    # Proof.

    def checksums(self) -> EngineSums:
        """Of every planned parameter as it is now; of those that are packed away, as they came with the last sync that
        asked for proof.
        """
        live = {name: checksum.whole(tensor) for name, tensor in self.recording.live.items()}
        own = self.recording
        return EngineSums(
            {**{name: int(total) for name, total in live.items()}, **self.packed_sums},
            len(own.images) + len(own.repack) + len(own.plan.reload)
        )


def _process(layer: Any) -> None:
    """vLLM's own step after loading: on CPU, the packed copy that the layer computes with. Its experts' own step packs
    them the first time only.
    """
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    (layer.quant_method if kernel is None else kernel.fused_experts).process_weights_after_loading(layer)


def _engine(worker: Any) -> PlannedWeightTransferEngine:
    engine: PlannedWeightTransferEngine = worker.weight_transfer_engine
    return engine


def plan_of(worker: Any, metas: bytes, distrusted: frozenset[str]) -> bytes:
    with set_current_vllm_config(worker.vllm_config):
        return pickle.dumps(_engine(worker).plan(pickle.loads(metas), distrusted))


def checksums(worker: Any) -> bytes:
    """Pickled EngineSums."""
    return pickle.dumps(_engine(worker).checksums())
