"""model.source on a loopback hub that refuses, cuts and goes away: what comes is whole, and comes once."""

import hashlib
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_api.job import ModelSpec
from rlhf_worker.errors import BadSpec, DownloadFailed
from rlhf_worker.hub import Asker, Keeper, RemoteKeeper, chosen, ensure, fetch, spread
from rlhf_worker.local import local_ray
from rlhf_worker.placement import Bundle
from rlhf_worker.progress import Reporter
from tests.worker.configs import run_config

REPO, COMMIT = "some/model", "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "sub/notes.txt": b"n" * 10,
}


def listed(name: str, data: bytes) -> dict[str, Any]:
    """As the hub tells of a file: large ones are beside git, and have a sha256."""
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    told = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
    return told | {"lfs": lfs} if name.endswith(".safetensors") else told


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does. `trouble(method, path, number)`: what goes wrong with a path's numbered request."""

    protocol_version = "HTTP/1.1"
    url: str
    asked: Counter[str]
    sent: Counter[str]
    trouble: Callable[[str, str, int], str]

    def do_GET(self) -> None:
        key = f"{self.command} {self.path.partition('?')[0]}"
        self.asked[key] += 1
        what = type(self).trouble(self.command, self.path, self.asked[key])
        if what == "drop":
            self.close_connection = True
            self.connection.close()
        elif what.isdigit():
            self._answer(int(what), b"no", {"Retry-After": "7"} if what == "429" else {})
        elif self.path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self._file(self.path.partition(f"{COMMIT}/")[2], cut=what == "cut", damaged=what == "damaged")
        else:
            files = [listed(name, data) for name, data in FILES.items()]
            body = {"id": REPO, "sha": COMMIT, "siblings": files}
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, *, cut: bool, damaged: bool) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        data = bytes(len(FILES[name]) - start) if damaged else FILES[name][start:]
        headers = {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(FILES[name]) - 1}/{len(FILES[name])}"
        if self.command == "GET":
            self.sent[name] += len(data) // 2 if cut else len(data)
        self._answer(206 if start else 200, data, headers, cut=cut)

    def _answer(self, code: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(trouble: Callable[[str, str, int], str] = lambda *_: "") -> Iterator[type[Hub]]:
    handler: type[Hub] = type(
        "Handler", (Hub,), {"asked": Counter(), "sent": Counter(), "trouble": staticmethod(trouble)}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def used(
    monkeypatch: pytest.MonkeyPatch, trouble: Callable[[str, str, int], str] = lambda *_: ""
) -> Iterator[type[Hub]]:
    """By huggingface_hub in this process, whose own waits are left out."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with serving(trouble) as handler:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", handler.url)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # what a cut costs at most
        yield handler


def model(path: Path, **source: Any) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(path), "source": {"repo": REPO, **source}})


def keeper(path: Path, **source: Any) -> Keeper:
    return Keeper("spec.model", model(path, **source), 600.0)


def is_whole(path: Path) -> bool:
    return all((path / name).read_bytes() == data for name, data in FILES.items())


def test_what_is_refused_and_cut_is_tried_again_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is refused, and a file is cut: it goes on where it was."""

    def trouble(method: str, path: str, number: int) -> str:
        if path.startswith("/api/models"):
            return "429" if number <= 2 else "drop" if number == 3 else ""
        return "cut" if method == "GET" and "safetensors" in path and number <= 3 else ""

    waits = list[float]()
    made = keeper(tmp_path / "model")
    with used(monkeypatch, trouble) as handler:
        assert made.whole() is None
        assert made.download(waits.append) == {name: len(data) for name, data in FILES.items()}
    assert is_whole(tmp_path / "model") and made.whole() and made.status().startswith("0.0 of 0.0 GiB of some/model")
    assert handler.sent["model.safetensors"] == len(FILES["model.safetensors"])  # not a byte twice
    assert waits and waits[0] >= 7.0  # as the hub asked


def test_a_process_that_died_while_it_downloaded_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    def die(seconds: float) -> None:
        raise Died

    cut = itertools.count()
    with (
        used(
            monkeypatch,
            lambda method, path, number: (
                ("cut" if next(cut) == 0 else "503") if method == "GET" and "safetensors" in path else ""
            ),
        ) as handler,
        pytest.raises(Died),
    ):
        keeper(tmp_path / "model").download(die)
    half = handler.sent["model.safetensors"]
    again = keeper(tmp_path / "model")
    assert again.whole() is None and again.bytes() >= half > 0
    with used(monkeypatch) as handler:
        again.download()
        assert handler.sent["model.safetensors"] == len(FILES["model.safetensors"]) - half and is_whole(
            tmp_path / "model"
        )
        asked = handler.asked.total()
        ensure(model(tmp_path / "model"), 600.0)
        assert handler.asked.total() == asked  # what is whole is used without asking


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_try_mends_names_field_repository_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with (
        used(monkeypatch, lambda *_: str(status)),
        pytest.raises(BadSpec, match=rf"spec\.model\.source: some/model at v2: the hub answers {status}: .*HF_TOKEN"),
    ):
        keeper(tmp_path, revision="v2").download()


def test_another_model_in_the_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with used(monkeypatch):
        keeper(tmp_path).download()
    with pytest.raises(
        BadSpec,
        match=r"spec\.model\.path: .*: some/model at main is there, source is some/model at v2: use another directory",
    ):
        keeper(tmp_path, revision="v2").whole()
    (tmp_path / "config.json").write_text("cut")
    assert keeper(tmp_path).whole() is None


def test_a_hub_that_is_gone_for_too_long_ends_the_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("rlhf_worker.hub.time.monotonic", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += 600.0

    with (
        used(monkeypatch, lambda *_: "drop"),
        pytest.raises(DownloadFailed, match=r"some/model at main: 600 s without progress"),
    ):
        keeper(tmp_path).download(wait)


def test_a_damaged_file_is_downloaded_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the right size, so that only its digest tells."""
    name = "model.safetensors"

    def once(method: str, path: str, number: int) -> str:
        return "damaged" if method == "GET" and path.endswith(name) and number == 1 else ""

    with used(monkeypatch, once) as handler:
        keeper(tmp_path / "model").download()
        assert is_whole(tmp_path / "model") and handler.sent[name] == 2 * len(FILES[name])


def test_a_file_that_is_damaged_twice_is_told_with_both_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, bad = "model.safetensors", hashlib.sha256(bytes(len(FILES["model.safetensors"]))).hexdigest()
    good = hashlib.sha256(FILES[name]).hexdigest()
    words = rf"source: some/model: {name} came damaged twice: its sha256 is {bad}, and the hub says {good}: "
    with (
        used(monkeypatch, lambda method, path, _: "damaged" if path.endswith(name) else ""),
        pytest.raises(DownloadFailed, match=words),
    ):
        keeper(tmp_path / "model").download()
    assert not list(tmp_path.rglob(f"{name}*")) and keeper(tmp_path / "model").whole() is None


def test_the_rest_of_a_damaged_beginning_makes_no_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "model" / f".{COMMIT}"
    begun.mkdir(parents=True)
    (begun / "model.safetensors.part").write_bytes(bytes(1000))
    (begun / "config.json.part").write_bytes(bytes(1000))  # longer than it is
    with used(monkeypatch):
        keeper(tmp_path / "model").download()
    assert is_whole(tmp_path / "model")


def test_the_hub_is_waited_for_where_a_path_is_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers at last is told by who reads the model: a refusal is no matter here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    waits, told = list[float](), list[str]()
    asker = Asker("spec.model", ModelSpec.model_validate({"path": REPO}), 600.0)

    def wait(seconds: float) -> None:
        waits.append(seconds)
        told.append(asker.status())

    answers = iter(["drop", "drop", "503", "", "drop", "404"])
    with used(monkeypatch, lambda *_: next(answers)):
        asker.answer(wait)
        assert len(waits) == 3
        asker.answer(wait)
    assert len(waits) == 4 and next(answers, None) is None
    assert told[0].startswith("spec.model.path: some/model: waiting for the hub, try 2 after: ")
    here = Asker("spec.model", ModelSpec.model_validate({"path": str(tmp_path)}), 600.0)
    here.answer(wait)


def test_the_files_that_are_loaded() -> None:
    names = [
        "config.json",
        ".gitattributes",
        "model.safetensors",
        "pytorch_model.bin",
        "original/a.safetensors",
        "onnx/m.onnx",
        "modeling.py",
    ]
    assert list(chosen(dict.fromkeys(names, 1))) == ["config.json", "model.safetensors", "modeling.py"]
    assert list(chosen(dict.fromkeys(names[:1] + names[3:4], 1))) == ["config.json", "pytorch_model.bin"]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_one_node_downloads_and_the_others_find_or_copy_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second node shares the first one's volume, the third has its own. A run that begins again asks nobody."""
    specs = [model(tmp_path / name) for name in ("a", "a", "b")]
    config = run_config(
        model={"path": str(tmp_path / "a"), "source": {"repo": REPO}}, rollout={"engine": "hf", "maxTokens": 16}
    )
    bundles = {slot: Bundle(slot, "node", "0", "cpu", 1) for slot in range(2)}
    stage, told, reporter = (
        SimpleNamespace(bundles=bundles, options=lambda *_: {"num_cpus": 0}),
        list[str](),
        Reporter(config),
    )
    whole = {name: len(data) for name, data in FILES.items()}
    with serving() as handler:
        monkeypatch.setenv("HF_ENDPOINT", handler.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        with local_ray(config, verbose=False):
            kind = RemoteKeeper.options(num_cpus=0, max_concurrency=4)
            keepers = [kind.remote("spec.model", one, 600.0) for one in specs]
            spread(keepers, told.append)
            assert handler.sent == whole and is_whole(tmp_path / "a") and is_whole(tmp_path / "b")
            fetch(config, stage, reporter)  # type: ignore[arg-type]
            assert handler.sent == whole
            (tmp_path / "a" / "config.json").unlink()
            fetch(config, stage, reporter)  # type: ignore[arg-type]
            asked = handler.asked.total()
            fetch(run_config(model={"path": REPO}), stage, reporter)  # type: ignore[arg-type]
            assert handler.asked.total() == asked + 1  # whether it answers, before everybody asks
    assert is_whole(tmp_path / "a") and handler.sent == {name: 2 * size for name, size in whole.items()}
    assert told[0].startswith("downloading: ") and any(words.startswith("copying to 1 nodes: ") for words in told)
    assert reporter.progress.detail.startswith("downloading: ")
