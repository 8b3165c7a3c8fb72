"""Hosts of IPv4 and IPv6 alike, through those that meet by them. A machine without IPv6 lacks what is to be tested."""

import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rlhf_worker.addresses import free_port, tcp
from rlhf_worker.trainer.policy import Policy
from rlhf_worker.trainer.rank import Trainer
from rlhf_worker.weights import wire
from rlhf_worker.weights.control import Hub, Member
from tests.worker.configs import run_config

HOSTS = ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("host", "uri"), [("10.0.0.7", "tcp://10.0.0.7:29571"), ("fd00:10:244::7", "tcp://[fd00:10:244::7]:29571")]
)
def test_a_meeting_place_is_written_as_torch_reads_it(host: str, uri: str) -> None:
    assert tcp(host, 29571) == uri


@pytest.mark.parametrize("host", HOSTS)
def test_a_rank_finds_a_port_and_joins_its_group(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: host)
    config = run_config(checkpoint={"path": str(tmp_path)})
    policy = Policy(config, ["policy"], 0, 1, "cpu", 1)
    address = policy.address()
    assert address[0] == host
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    trainer = Trainer(config, ["policy"], 0, 1, "cpu", 1)
    trainer.join(address)
    assert dist.get_world_size() == 1
    dist.destroy_process_group()


@pytest.mark.parametrize("host", HOSTS)
def test_members_of_a_sync_meet_their_hub(host: str) -> None:
    hub = Hub(host)
    member = Member(hub.meeting, 1, 10.0)
    hub.accept(1, 10.0, lambda: False)
    hub.order("go", range(1, 2))
    assert member.next() == "go"
    member.answer(None)
    hub.finish(10.0)
    member.close()
    hub.close()


class NoNccl:
    def __init__(self, group: Any, device: Any) -> None:
        self.group = group


@pytest.mark.parametrize("host", HOSTS)
def test_nccls_ranks_meet(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where NCCL itself begins, which needs GPUs."""
    monkeypatch.setattr(wire, "_Communicator", NoNccl)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    meeting, met = (host, free_port(host)), list[Any]()
    one = threading.Thread(target=lambda: met.append(channel(meeting, 1)), daemon=True)
    one.start()
    met.append(channel(meeting, 0))
    one.join(30.0)
    assert sorted(each.nccl.group.rank for each in met) == [0, 1]
    assert all(isinstance(each.nccl.group.store, TCPStore) for each in met)


def channel(meeting: tuple[str, int], rank: int) -> Any:
    return wire.NcclChannel(wire.Address(meeting, rank, 2, 30.0), torch.device("cpu"))
