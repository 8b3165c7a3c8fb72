"""docs/status.md names every reason that the operator can give."""

import ast
from collections.abc import Iterator

from hack.generate import ROOT
from rlhf_api.status import ConditionType, FailureClass, Phase

PAGE = (ROOT / "docs/status.md").read_text()
TELLERS = {"yes": 0, "no": 0, "unknown": 0, "Outcome": 1, "Refusal": 0, "_waiting": 1}


def reasons() -> Iterator[str]:
    """The literal reasons in calls such as no("Stalled", ...), also those of conditional expressions."""
    for path in (ROOT / "operator/rlhf_operator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in TELLERS
                and len(node.args) > TELLERS[node.func.id]
            ):
                argument = node.args[TELLERS[node.func.id]]
                options = (argument.body, argument.orelse) if isinstance(argument, ast.IfExp) else (argument,)
                yield from (
                    o.value for o in options if isinstance(o, ast.Constant) and isinstance(o.value, str) and o.value
                )


def test_every_reason_is_explained() -> None:
    found = set(reasons())
    assert len(found) > 30, "the search must find the operator's reasons"
    assert sorted(reason for reason in found if reason not in PAGE) == []


def test_every_phase_condition_and_failure_class_has_its_row() -> None:
    names = [*Phase, *ConditionType, *FailureClass]
    assert [name.value for name in names if f"| {name.value} " not in PAGE] == []
