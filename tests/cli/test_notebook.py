"""The docs' notebook: its cells, in their order, against an API server and a stand-in for the operator."""

import ast
import asyncio
import inspect
import json
import threading
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_operator.kinds import CONFIG_MAPS, JOBS
from tests.cli.conftest import RUNNING, Cluster

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
LOG = "Starting: preflight\nstep 3/10  reward 0.446\n"


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text())
    assert (found["nbformat"], all(not cell.get("outputs") for cell in found["cells"])) == (4, True)
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]


async def run(sources: list[str]) -> str:
    """What they print. As IPython does it: one namespace, and `await` at the top of a cell."""
    names: dict[str, Any] = {}
    with redirect_stdout(StringIO()) as printed:
        for at, source in enumerate(sources):
            made = eval(compile(source, f"cell {at}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
            if inspect.iscoroutine(made):
                await made
    return printed.getvalue()


def operate(cluster: Cluster, over: threading.Event) -> None:
    """Steps while the job runs, Suspended when it is asked to, Succeeded once it was resumed."""
    step = 0
    while not over.wait(0.05):
        for raw in cluster.server.of(JOBS):
            wants = raw["spec"].get("suspend")
            if wants is False:
                status = RUNNING | {"phase": "Succeeded", "reason": "JobSucceeded"}
            elif wants:
                status = RUNNING | {"phase": "Suspended", "reason": "Suspended"}
            else:
                step += 1
                status = RUNNING | {"progress": RUNNING["progress"] | {"step": step, "display": f"{step}/10"}}
            url = f"{cluster.server.url}/apis/{JOBS.api_version}/namespaces/default/rlhfjobs/{raw['metadata']['name']}"
            httpx.patch(url, json={"status": status})  # by the server's own loop, which the client changes it in too


def test_its_cells_run_as_they_stand(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig)
    cluster.head("letters", LOG)
    over = threading.Event()
    operator = threading.Thread(target=operate, args=(cluster, over))
    operator.start()
    try:
        said = asyncio.run(asyncio.wait_for(run(cells()), 60))
    finally:
        over.set()
        operator.join()
    for words in ("letters in default", "Running 3/10 0.446 23s", "step 3/10  reward 0.446", "Succeeded after",
        "no RLHFJob leters in namespace default (did you mean letters?)"):
        assert words in said, said
    assert not cluster.server.of(JOBS), "the last cell removes it"
    (files,) = cluster.server.of(CONFIG_MAPS)
    assert files["data"]["prompts.jsonl"].startswith('{"prompt": "1 + 1 ="}\n')
