"""What `helm test` takes for a working operator, and what it says of one that is not."""

import pytest

from rlhf_operator.smoke import complaint, get, main

URL = "http://operator:8080"
READY, LEADS, STANDS_BY = (200, "ok"), (200, "x 1\nrlhf_operator_leader 1.0\n"), (200, "rlhf_operator_leader 0.0\n")


def answers(ready: tuple[int, str], *told: tuple[int, str]) -> dict[str, list[tuple[int, str]]]:
    """By path; the last one for ever."""
    return {"/readyz": [ready], "/metrics": list(told)}


def asked(by: dict[str, list[tuple[int, str]]], url: str) -> tuple[int, str]:
    each = by[url.removeprefix(URL)]
    return each.pop(0) if len(each) > 1 else each[0]


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (answers(READY, LEADS), ""),
        (answers((503, "not listed yet: rayclusters"), LEADS), "answers 503: not listed yet: rayclusters"),
        (answers((0, "refused"), LEADS), "answers nothing: refused"),
        (answers(READY, (500, "broken")), "/metrics answers 500: broken"),
        (answers(READY, STANDS_BY), "holds the Lease"),
        (answers(READY, (200, "rlhf_operator_leader 10\n")), "holds the Lease"),
    ],
)
def test_what_is_wrong(by: dict[str, list[tuple[int, str]]], words: str) -> None:
    said = complaint(URL, lambda url: asked(by, url))
    assert words in said and bool(words) == bool(said)


def test_a_standby_that_answers_first_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    by = answers(READY, STANDS_BY, STANDS_BY, LEADS)
    assert main(URL, lambda url: asked(by, url), pause=lambda _: None) == 0
    assert "leads" in capsys.readouterr().out


def test_what_does_not_come_in_time_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(URL, lambda _: (0, "refused"), wait_seconds=0.0, pause=lambda _: None) == 1
    assert "refused" in capsys.readouterr().err


def test_nobody_there_is_an_answer_too() -> None:
    assert get("http://127.0.0.1:9/readyz")[0] == 0
