"""The host's memory for what leaves the device."""

import torch

from rlhf_worker.trainer.offload import Shelf


def test_what_is_put_away_takes_nothing_and_comes_back_into_the_same_tensors() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7), torch.tensor(2.0)]
    view, wanted = tensors[0][1], [tensor.clone() for tensor in tensors]
    shelf = Shelf()
    for _ in range(2):
        shelf.put_away([*tensors, tensors[0].view(-1), 0.5])  # tied, and a number that is no tensor
        shelf.put_away(tensors)  # which are away
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0]
        shelf.fetch()
        shelf.fetch()
        assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, wanted, strict=True))
        assert torch.equal(view, wanted[0][1])
        tensors[1] += 1
        wanted[1] += 1


def test_the_memory_is_made_once_and_goes_with_its_tensor() -> None:
    kept, gone = torch.zeros(4), torch.zeros(4)
    shelf = Shelf()
    shelf.put_away([kept, gone])
    first = {here.data_ptr() for here in shelf._kept.values()}
    shelf.fetch()
    shelf.put_away([kept])
    (here,) = shelf._kept.values()
    assert here.data_ptr() in first
    shelf.fetch()
    shelf.put_away([kept, torch.ones(8)])
    assert len(shelf._kept) == 2 and here.data_ptr() in {one.data_ptr() for one in shelf._kept.values()}


def test_what_others_read_in_shared_memory_stays() -> None:
    shared = torch.ones(4).share_memory_()  # type: ignore[no-untyped-call]
    shelf = Shelf()
    shelf.put_away([shared])
    assert shared.untyped_storage().nbytes() == 16 and shelf._kept == {}
