"""What k completions of a prompt would do, estimated from its n: exact means over all sets of k of them. Pure."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray


def pass_at(n: int, passed: int, k: int) -> float:
    """Probability that at least one of k of n completions passes, `passed` of which do: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1); 1 - (1 - c / n)^k would be too low.
    """
    return 1.0 - comb(n - passed, k) / comb(n, k)


def majority_at(answers: Sequence[str | None], passed: Sequence[bool], k: int) -> float:
    """Probability that the commonest answer of k of the completions is right.

    Of answers equally common one is taken at random. None has no vote, and k of them are wrong. An answer is right as
    often as the completions that give it passed.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    right = {
        answer: sum(ok for given, ok in zip(answers, passed, strict=True) if given == answer) / count
        for answer, count in votes.items()
    }
    silent, most = len(answers) - votes.total(), min(k, max(votes.values(), default=0))
    return sum(_won(votes, right, silent, count, k) for count in range(1, most + 1)) / comb(len(answers), k)


def _won(votes: Counter[str], right: dict[str, float], silent: int, count: int, k: int) -> float:
    """Sets of k whose commonest answers have `count` votes each, times the share of those answers that is right."""
    rarer = silent + sum(number for number in votes.values() if number < count)
    # By how many answers have `count` votes: the ways to draw 0 to k, and those times how many of these are right.
    ties = {0: np.stack([_choices(rarer, k, k), np.zeros(k + 1)])}
    for answer, number in votes.items():
        if number >= count:
            fewer, ways = _choices(number, count - 1, k), comb(number, count)
            tied = {
                n + 1: ways * (rows + right[answer] * np.stack([np.zeros(k + 1), rows[0]])) for n, rows in ties.items()
            }
            ties = {n: np.stack([np.convolve(row, fewer)[: k + 1] for row in rows]) for n, rows in ties.items()}
            for n, rows in tied.items():
                moved = np.pad(rows, ((0, 0), (count, 0)))[:, : k + 1]
                ties[n] = ties.get(n, np.zeros_like(moved)) + moved
            ties = {n: rows for n, rows in ties.items() if rows.any()}
    return sum(float(rows[1, k]) / n for n, rows in ties.items() if n)


def _choices(number: int, most: int, k: int) -> NDArray[np.float64]:
    """Ways to draw 0, 1, ..., k of `number`, at most `most`."""
    return np.array([comb(number, drawn) if drawn <= most else 0 for drawn in range(k + 1)], dtype=np.float64)
