"""Every reason, phase, class, exit code and error has its section, and there is none for what is not there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from hack.generate import ROOT
from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC, EXIT_OK
from rlhf_api.status import ConditionType, FailureClass, Phase
from rlhf_cli.advice import ADVICE
from rlhf_cli.exits import CODES, Exit
from rlhf_client import errors as client_errors
from rlhf_operator.complaints import TELLING
from rlhf_operator.decide.classes import RESTARTING
from rlhf_operator.decide.conditions import QUOTA_REASONS
from rlhf_worker import errors, run, stop
from rlhf_worker.trainer.checks import CHECKS

DOCS = ROOT / "docs"
STATUS = (DOCS / "status.md").read_text()
TELLERS = {"yes": 0, "no": 0, "unknown": 0, "Outcome": 1, "_waiting": 1, "Refusal": 0}
# Reasons that are no literals where they are told: by the expression that tells them.
ELSEWHERE = {
    "MEANINGS[last.failure_class].reason": {*RESTARTING},
    "reserved.reason": {*QUOTA_REASONS},
    "complaint.reason": {*TELLING},
    "found.failed": None,  # the worker's checks: see `checks`
    "f.record.result_reason": set[str](),  # an Outcome's, which was recorded
    "found.reason": set[str](),  # the same, cut to its length
    "reason": set[str](),  # what a function such as `refused` was given
}  # fmt: skip


def headings(page: str, level: int = 3) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", (DOCS / page).read_text(), re.MULTILINE)


def values(node: ast.expr, within: ast.AST) -> Iterator[str]:
    """The strings that an expression may be: those of conditions, of lookups, of a name that is set in `within`."""
    match node:
        case ast.Constant(value=str(text)):
            yield from [text] if text else []
        case ast.IfExp():
            yield from (found for part in (node.body, node.orelse) for found in values(part, within))
        case ast.BoolOp():
            yield from (found for part in node.values for found in values(part, within))
        case ast.Call(func=ast.Attribute(value=ast.Dict() as table, attr="get")):
            yield from (found for part in table.values for found in values(part, within))
        case ast.Name(id=name) if assigned := [
            one.value for one in ast.walk(within)
            if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name) and one.targets[0].id == name
        ]:
            yield from (found for part in assigned for found in values(part, within))
        case _:
            yield from ELSEWHERE[ast.unparse(node)] or checks()


def functions(folder: Path) -> Iterator[ast.AST]:
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        nested = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        yield from nested
        yield ast.Module([node for node in tree.body if node not in nested and not isinstance(node, ast.ClassDef)], [])


def told() -> Iterator[str]:
    """By the operator, and by functions that it passes literals to."""
    for function in functions(ROOT / "operator/rlhf_operator"):
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in TELLERS:
                at = TELLERS[call.func.id]
                yield from values(call.args[at], function) if len(call.args) > at else ()


def checks() -> set[str]:
    """The names under which the worker tries things before the first step."""
    calls = [
        node for file in ("preflight.py", "crew.py")
        for node in ast.walk(ast.parse((ROOT / "worker/rlhf_worker" / file).read_text()))
    ]
    tables = [node.value for node in calls if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    tables += [arg for node in calls if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and node.func.id == "_settle" for arg in node.args if isinstance(arg, ast.Dict)]
    found = {key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)}
    added = {
        str(node.args[0].value) for node in calls if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add" and node.args and isinstance(node.args[0], ast.Constant)
    }
    return {str(name) for name in found} | added | {*CHECKS}


def test_every_reason_has_its_section_and_there_is_no_other() -> None:
    assert len(checks()) > 12 and len({*told()}) > 80, "the search must find them"
    assert {*headings("reasons.md")} == {*told()} == {*ADVICE}


def rows(section: str) -> list[list[str]]:
    text = STATUS.split(f"\n## {section}\n" if f"\n## {section}\n" in STATUS else f"\n### {section}\n")[1]
    table = [line for line in re.split(r"\n##", text)[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]


def test_the_page_on_the_status_has_the_same_reasons_of_the_same_conditions() -> None:
    word = re.compile(r"\b[A-Z]\w+[a-z]\w*\b")
    below = {"ClusterReady": "Why ClusterReady is False", "PreflightPassed": "Why PreflightPassed is False",
        "Failed": "Why a job is Failed"}
    pairs = {(name, reason) for row in rows("Conditions") for name in [row[0].split(" ")[0]]
        for cell in row[1:] for reason in word.findall(cell.replace("see below", "").replace("the check", ""))}
    pairs |= {(of, reason) for of, section in below.items() for row in rows(section) for reason in word.findall(row[0])}
    assert pairs == {(of.value, reason) for reason, advice in ADVICE.items() for of in advice.of}


def test_every_phase_condition_and_failure_class_has_its_row() -> None:
    names = [*Phase, *ConditionType, *FailureClass]
    assert [name.value for name in names if f"| {name.value} " not in STATUS] == []


def test_every_exit_code_has_its_section_and_there_is_no_other() -> None:
    driver = {EXIT_OK, run.EXIT_FAILED, EXIT_BAD_SPEC, EXIT_BAD_DATA, stop.EXIT_TERMINATED}
    source = (ROOT / "operator/rlhf_operator/__main__.py").read_text()
    operator = {int(code) for code in re.findall(r"return (\d)\b", source)}
    whose = {"Driver": driver, "kubectl rlhf": {int(code) for code in Exit}, "Operator": operator}
    found = [heading for heading in headings("errors.md") if re.search(r": \d+$", heading)]
    assert {*found} == {f"{name}: {code}" for name, codes in whose.items() for code in codes}
    table = re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == [int(code) for code in Exit]


def classes(module: object) -> set[str]:
    return {name for name, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, Exception)
        and kind.__module__ == getattr(module, "__name__", "")}


def test_every_error_has_its_section_and_there_is_no_other() -> None:
    """The driver's classes, and what the worker's table of errors tells apart."""
    expected = classes(errors) | classes(stop) | {call.value for call in errors.Call}
    expected |= {verdict.name for verdict in errors.Verdict} | {"Which error has which verdict"}
    assert {heading for heading in headings("errors.md") if not re.search(r": \d+$", heading)} == expected


def test_every_error_of_the_client_has_its_row_and_its_exit_code() -> None:
    section = (DOCS / "cli.md").read_text().split("| Error | Means |")[1].split("\n\n")[0]
    names = classes(client_errors) - {"ClientError"}
    assert {*re.findall(r"`([A-Z]\w+)`", section)} == names == {kind.__name__ for kind in CODES}
