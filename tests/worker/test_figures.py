"""Rows of benchmarks against the kept ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from hack.bench import compare, row

LAST: dict[str, Any] = {
    "benchmark": "training", "card": "NVIDIA H200", "configuration": {"shape": "4B"}, "lower": {"median": 2.0},
    "higher": {"tokens_per_second": 100.0}, "more": {}, "versions": {}, "commit": "", "date": "", "command": "",
}  # fmt: skip


def now(**changes: Any) -> dict[str, Any]:
    return LAST | changes


@pytest.mark.parametrize(("changed", "well"), [
    ({}, True),
    ({"lower": {"median": 2.09}}, True),
    ({"lower": {"median": 2.11}}, False),
    ({"lower": {"median": 1.0}, "higher": {"tokens_per_second": 200.0}}, True),
    ({"higher": {"tokens_per_second": 96.0}}, True),
    ({"higher": {"tokens_per_second": 94.0}}, False),
    ({"higher": {"tokens_per_second": 0.0}}, False),
    ({"lower": {"other": 100.0}}, True),  # nothing to compare it with
    ({"lower": {}, "higher": {}, "more": {"error": "out of memory"}}, False),
    ({"card": "NVIDIA B200", "lower": {"median": 9.0}}, True),  # another card
    ({"configuration": {"shape": "8B"}, "lower": {"median": 9.0}}, True),
])  # fmt: skip
def test_what_is_worse_than_the_last_is_told(
    changed: dict[str, Any], well: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.keep(tmp_path / "figures", LAST)
    (tmp_path / "rows").write_text("a table\n{broken\n{}\n" + json.dumps(now(**changed)) + "\n")
    code = compare.main([str(tmp_path / "rows"), "--figures", str(tmp_path / "figures")])
    said = capsys.readouterr().out
    assert (code == 0) is well, said
    assert well or "WORSE" in said or "FAILED" in said


def test_a_row_is_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(row, "card", lambda: "NVIDIA H200")
    row.printed("step", {"shape": "tiny"}, lower={"step": 1.0}, seconds=[1.0])
    row.printed("step", {"shape": "large"}, error="no memory")
    (tmp_path / "rows").write_text(capsys.readouterr().out)
    given = [str(tmp_path / "rows"), "--figures", str(tmp_path)]
    assert compare.main([*given, "--keep"]) == 1, "one failed"
    (kept,) = tmp_path.glob("NVIDIA-H200/step-*.json")
    assert json.loads(kept.read_text())["more"] == {"seconds": [1.0]}
    compare.main(given)
    assert "step: 1 -> 1, 0.0% better" in capsys.readouterr().out


def test_no_row_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("Traceback\n")
    assert compare.main([str(tmp_path / "rows")]) == 1


def test_the_kept_figures_are_where_they_are_looked_for() -> None:
    paths = list(compare.FIGURES.glob("*/*.json"))
    assert paths
    assert [path for path in paths if compare.FIGURES / compare.place(json.loads(path.read_text())) != path] == []


def test_a_machine_without_a_gpu_or_git_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert (row.card(), row.commit()) == ("CPU", "")
    assert row.versions().keys() >= {"python", "torch", "ray"}
