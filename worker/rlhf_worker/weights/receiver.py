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
from rlhf_worker.weights.plan import Piece, RankPlan, to_all
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
    held: Mapping[int, dict[str, Tensor]] = {}  # the memory of trainer ranks on this node
    links: Sequence[wire.Link] = ()  # to the others
    member: Member | None = None
    copies: tuple[list[Tensor], list[Tensor]] = ([], [])  # from the trainer's memory into live parameters
    packed_sums: dict[str, int]

    def plan(self, metas: Sequence[ParamMeta], distrusted: frozenset[str]) -> RankPlan:
        self.shutdown()
        self.recording = record(self.model, metas, distrusted)
        return self.recording.plan

    @property
    def rank(self) -> int:
        return int(self.parallel_config.rank)

    def init_transfer_engine(self, init_info: PlannedInitInfo) -> None:
        self.terms, self.engine = pickle.loads(init_info.terms), init_info.engine
        self.me = self.terms.group.number(self.engine, self.rank)
        self.read = self.terms.read(self.recording.plan, self.engine)
        self._open(self.terms.handles)
        if self.terms.transient:
            self._let_go()
        alone = self.terms.alone(self.engine)
        far = [] if alone else self.terms.far(self.terms.sent(self.recording.plan), self.engine)
        self.sent = {piece.move.target for piece in far}
        self.links = [
            self.terms.open(
                number, leg.group(self.terms.group.ranks).number(leg.engines.index(self.engine), self.rank),
                {self.rank: leg.own(far)}, self.device,
            )
            for number, leg in enumerate(self.terms.legs) if self.engine in leg.engines
        ]
        self.stage = wire.shared_stage(self.links, self.device)
        self.member = Member(self.terms.control, self.me, self.terms.deadline_seconds)
        self.serving = threading.Thread(target=self._serve, args=(self.member,), name="weight sync", daemon=True)
        self.serving.start()

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
            self._receive(order.proof)
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
        for link in self.links:
            link.channel.close()
        self._let_go()
        self.member, self.links = None, ()
        self.packed_sums = {}

    # Memory that this process sees, and what comes over links.

    def _open(self, handles: Sequence[Mapping[str, mapped.Handle]]) -> None:
        self._let_go()  # the old mapping goes before the new one comes
        reader = self.terms.readers(self.terms.engines[self.engine]).index(self.engine)
        reader = reader * self.terms.group.ranks + self.rank
        self.held = {
            rank: mapped.open_all(handles[rank], self.device, reader) for rank in self.terms.near(self.engine)
        }
        direct = [piece for piece in self.read if piece.move.target in self.recording.live]
        self.copies = ([self._put(piece) for piece in direct], [self._take(piece) for piece in direct])
        self.parts: dict[str, list[Piece]] = {
            image.name: [] for images in self.recording.images.values() for image in images
        }
        for piece in self.read:
            if piece.move.target in self.parts:
                self.parts[piece.move.target].append(piece)

    def _let_go(self) -> None:
        self.held, self.copies = {}, ([], [])

    def _take(self, piece: Piece) -> Tensor:
        return placed(self.held[piece.rank][piece.move.source], piece.move.take)

    def _put(self, piece: Piece) -> Tensor:
        return placed(self.recording.live[piece.move.target], piece.move.put)

    def _receive(self, proof: bool) -> None:
        copy_all(*self.copies)
        images = [image for images in self.recording.images.values() for image in images]
        made = {image.name: torch.zeros(image.shape, dtype=image.dtype) for image in images if image.name in self.sent}
        if made or not all(link.waves for link in self.links):
            targets = {**self.recording.live, **made}
            for link in self.links:
                link.prepare(
                    lambda piece: placed(targets[piece.move.target], piece.move.put),
                    lambda piece: targets[piece.move.target].dtype, self.stage,
                )
        for link in self.links:
            link.run(self._given_up)
        for layer, own in self.recording.images.items():
            # experts may be computed with as they are, by a kernel that packs nothing
            lend = hasattr(layer, "cpu_linear")
            self._pack(layer, {image.name: self._image(image, made.get(image.name), lend) for image in own}, proof)

    def _image(self, image: Image, sent: Tensor | None, lend: bool) -> Tensor:
        """A parameter as it is before it is packed: the trainer's own memory where that may be lent and has the same
        form, else assembled. sent: with what came over links.
        """
        parts = self.parts[image.name]
        if sent is None and lend and len(parts) == 1 and parts[0].move.take.contiguous and (
            held := self._take(parts[0])
        ).dtype == image.dtype and held.numel() == prod(image.shape):
            return held.view(image.shape)
        made = torch.zeros(image.shape, dtype=image.dtype) if sent is None else sent
        for part in parts:
            placed(made, part.move.put).copy_(self._take(part))
        return made

    def _pack(self, layer: nn.Module, images: Mapping[str, Tensor], proof: bool) -> None:
        for name, image in images.items():
            if proof:
                self.packed_sums[name] = int(checksum.whole(image))
            setattr(layer, name.rpartition(".")[2], nn.Parameter(image, requires_grad=False))
        _process(layer)

    def _given_up(self) -> bool:
        return self.member is None or self.member.hung_up()

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
        parts = self.terms.whole(meta, dtype, self.engine)
        for part in parts:
            if part.rank in self.held:
                placed(made, part.move.put).copy_(self._take(part))
        for link in self.links:
            hops = to_all(link.leg.own(parts), [link.me])
            link.once(hops, lambda piece: placed(made, piece.move.put), dtype, self._given_up)
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
