"""Specs from the CRD's own schema, by the hundred: none raises, and there are some of every end."""

from collections import Counter

from tests.api.generated import jobs, outcome


def test_every_spec_is_refused_or_planned() -> None:
    ends = Counter(outcome(raw) for raw in jobs(seed=11, count=400))
    assert set(ends) == {"planned", "refused: the schema's", "refused: a rule's", "refused: an override's"}
    assert ends["planned"] > 40


def test_a_spec_is_made_from_its_number_alone() -> None:
    assert list(jobs(seed=3, count=5)) == list(jobs(seed=3, count=9))[:5]
