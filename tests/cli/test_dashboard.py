"""The live page: what it serves, to whom, and what it says when something is wrong."""

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator

import httpx
import pytest

from rlhf_cli.dashboard import Cluster as Reader
from rlhf_cli.dashboard import Server, html
from rlhf_cli.exits import Exit
from rlhf_client import Client, connect
from tests.cli.conftest import RUNNING, Cli, Cluster
from tests.cli.test_cluster_verbs import LOG, started
from tests.cli.test_report import Page


@pytest.fixture
def site(cluster: Cluster) -> Iterator[httpx.Client]:
    with Server(0, Reader(Client(connect(cluster.kubeconfig)), everywhere=True)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as browser:
            yield browser
        server.shutdown()
        thread.join()


def test_the_page_loads_nothing_but_its_own_data(site: httpx.Client) -> None:
    answer = site.get("/")
    page = Page(answer.text)
    assert (answer.status_code, page.loaded, len(page.scripts)) == (200, [], 2)
    assert "%" not in "".join(part for part in answer.text.split() if part.startswith("%") and part.isupper())
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "uPlot" in html() and 'fetch(`/data' in html()


def test_it_tells_the_fleet_and_a_run(cluster: Cluster, site: httpx.Client) -> None:
    cluster.job(status=RUNNING)
    cluster.head("maths", LOG)
    cluster.job("new")
    found = site.get("/data", params={"run": "default/maths"}).json()
    assert found["fleet"]["columns"][:4] == ["NAMESPACE", "NAME", "PHASE", "STEP"]
    assert [row[:4] for row in found["fleet"]["rows"]] == [["default", "maths", "Running", "3/10"],
        ["default", "new", "-", ""]]
    assert found["run"]["title"] == "default/maths"
    for words in ("maths  Running (StepAdvancing)", "ValueError: no answer", "what to do"):
        assert words in found["run"]["text"], words
    assert [(one["number"], one["reward"]) for one in found["run"]["steps"]] == [(1, 0.02), (2, 0.25)]
    assert site.get("/data", params={"run": "default/gone"}).json()["run"] is None
    assert site.get("/data").json()["run"] is None


def test_a_page_of_another_name_gets_nothing(cluster: Cluster, site: httpx.Client) -> None:
    """A name of the internet that was turned to 127.0.0.1, after its page was loaded (DNS rebinding)."""
    cluster.job(status=RUNNING)
    for name in ("evil.example", "evil.example:80", ""):
        refused = site.get("/data", headers={"Host": name})
        assert refused.status_code in (400, 403) and "maths" not in refused.text
    assert site.get("/data", headers={"Host": f"localhost:{site.base_url.port}"}).status_code == 200


def test_nothing_can_be_changed_through_it(site: httpx.Client) -> None:
    assert {site.request(method, "/data").status_code for method in ("POST", "PUT", "DELETE", "PATCH")} == {501}
    assert site.get("/etc/passwd").status_code == 404


def test_a_cluster_that_goes_away_is_told_on_the_page(cluster: Cluster, site: httpx.Client) -> None:
    cluster.server.down = True
    assert "503" in site.get("/data").json()["error"]


def test_what_is_wrong_before_it_serves(cluster: Cluster, cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("dashboard", "--no-open", "--port", str(port))
    assert (result.exit_code, f"--port {port}: " in result.stderr) == (Exit.USAGE, True), result.output
    assert cli("dashboard", "--port", "99999").exit_code == Exit.USAGE
    cluster.server.answers["GET"] = [(403, {})]
    assert cli("dashboard", "--no-open").exit_code == Exit.NOT_ALLOWED


def test_it_serves_until_it_is_interrupted_also_where_no_browser_is(cluster: Cluster) -> None:
    process = started(cluster, "dashboard", stdout=subprocess.PIPE, stderr=subprocess.PIPE, BROWSER="false")
    assert process.stdout is not None
    url = process.stdout.readline().decode().strip()
    assert json.loads(httpx.get(f"{url}data").text)["fleet"]["rows"] == []
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in told.decode()) == (0, False), told
