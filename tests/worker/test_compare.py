"""Ledgers of checksums against each other."""

from rlhf_worker.weights.compare import MODULUS, EngineSums, compare


def test_ranks_shares_are_added_before_they_are_compared() -> None:
    trainer = [[{"a": MODULUS - 1, "b": 5}], [{"a": 3, "b": 0}]]
    found = compare(trainer, [[EngineSums({"a": 2, "b": 5}, 0)], [EngineSums({"a": 2 - MODULUS, "b": 4}, 3)]])
    assert (found.wrong, found.equal, found.indirect) == ({(1, 0): ["b"]}, 3, 3)


def test_each_tensor_parallel_rank_has_its_own_sums() -> None:
    trainer = [[{"a": 1}, {"a": 2}]]
    assert compare(trainer, [[EngineSums({"a": 1}, 0), EngineSums({"a": 2}, 0)]]).wrong == {}
    assert compare(
        trainer, [[EngineSums({"a": 2}, 0), EngineSums({"a": 1}, 0)]],
    ).wrong == {(0, 0): ["a"], (0, 1): ["a"]}


def test_what_is_packed_away_and_was_not_summed_is_not_compared() -> None:
    found = compare([[{"norm": 1, "qkv": 2}]], [[EngineSums({"norm": 1}, 1)]])
    assert (found.wrong, found.equal, found.indirect) == ({}, 1, 1)
