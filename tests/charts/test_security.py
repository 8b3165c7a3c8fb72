"""docs/security.md tells the rights that the rules grant, no more and no less."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from hack.generate import ROOT, render
from rlhf_api.job import RLHFJob
from rlhf_operator.names import driver_account_name
from rlhf_operator.plan import owned_metadata
from rlhf_operator.plan.access import access
from rlhf_operator.rbac import rules
from tests.api.specs import a_job

Rule = dict[str, Any]
PAGE = ROOT / "docs/security.md"
HEADER = "| Resources | Resource Names | Verbs |\n|---|---|---|\n"
ROW = re.compile(r"^\| (\S+) \| \[(.*)\] \| \[(.*)\] \|$", re.MULTILINE)
JOB = RLHFJob.model_validate(a_job("JOB"))


def drivers() -> list[Rule]:
    _, role, _ = access(JOB, owned_metadata(JOB))
    granted: list[Rule] = role["rules"]
    return granted


WHO: dict[str, list[Rule]] = {"operator": rules(), "driver": drivers(), "stranger": []}


def lines(granted: Iterable[Rule]) -> Iterator[str]:
    """As kubectl auth can-i --list prints them."""
    for rule in granted:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                name, _, sub = resource.partition("/")
                full = f"{name}.{group}" if group else name
                names = " ".join(rule.get("resourceNames", []))
                yield f"| {full}{'/' if sub else ''}{sub} | [{names}] | [{' '.join(rule['verbs'])}] |"


def section(who: str) -> re.Match[str]:
    found = re.search(rf"<!-- {who} -->\n(.*?)(?=<!-- )", PAGE.read_text(), re.DOTALL)
    assert found, f"docs/security.md has no place for the {who}"
    return found


def told(who: str) -> set[tuple[str, str, frozenset[str]]]:
    """Resource, resource names and verbs that the page tells of; `JOB` stands for its name."""
    return {(resource, names, frozenset(verbs.split())) for resource, names, verbs in ROW.findall(section(who)[1])}


@pytest.mark.parametrize("who", WHO)
def test_the_page_tells_the_rights(who: str) -> None:
    table = "".join(f"{line}\n" for line in lines(WHO[who]))
    title = {
        "operator": "The operator:", "driver": f"`{driver_account_name('JOB')}`, of each job by its name:",
    }.get(who)
    text = f"{title}\n\n{HEADER}{table}\n" if title else "A stranger, such as `default` in the job's namespace: nothing.\n\n"
    if os.environ.get("UPDATE_GOLDEN"):
        found = section(who)
        page = PAGE.read_text()
        PAGE.write_text(page[: found.start(1)] + text + page[found.end(1) :])
    assert section(who)[1] == text, "run again with UPDATE_GOLDEN=1 and read the diff"


def test_nobody_else_is_bound() -> None:
    """The chart binds the operator's account and no other; a job binds its driver's."""
    subjects = [subject["name"] for o in render() if o["kind"].endswith("RoleBinding") for subject in o["subjects"]]
    assert set(subjects) == {"rlhf-operator"}
    account, role, binding = access(JOB, owned_metadata(JOB))
    assert [subject["name"] for subject in binding["subjects"]] == [account["metadata"]["name"]]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_operator_grants_only_what_it_holds() -> None:
    held = {(resource, verb) for resource, _, verbs in told("operator") for verb in verbs}
    assert {(resource, verb) for resource, _, verbs in told("driver") for verb in verbs} <= held
