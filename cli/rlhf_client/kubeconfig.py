"""Where the API server is and who asks: a kubeconfig as kubectl reads it, or a pod's own service account.

Read here because Kubernetes' own package takes half a second to import, which is most of what a command may take. It
knows certificates, tokens, token files, basic authentication, exec plugins, proxies and impersonation; of the
auth-providers that kubectl dropped or deprecates, none.
"""

import base64
import binascii
import json
import os
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_client.errors import NoConnection, nearest

Raw = dict[str, Any]
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXEC_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Connection:
    """`headers` authenticate each request; `tls` is None for plain http. `renew` gives them anew: tokens of plugins and
    files expire while a job is followed.
    """

    server: str
    namespace: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    renew: Callable[[], dict[str, str]] = field(default=dict, repr=False)
    tls: ssl.SSLContext | None = None
    server_name: str | None = None
    proxy: str | None = None


def connect(kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None) -> Connection:
    """By `kubeconfig`, else $KUBECONFIG, else ~/.kube/config, else the pod's service account. Raises NoConnection."""
    paths = [Path(one) for one in (kubeconfig or os.environ.get("KUBECONFIG", "")).split(os.pathsep) if one]
    paths = paths or [Path.home() / ".kube" / "config"]
    there = [path for path in paths if path.is_file()]
    if not there:
        if kubeconfig is None and context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            return _in_cluster(namespace)
        looked = ", ".join(map(str, paths))
        raise NoConnection(f"no kubeconfig: {looked} is not there: set KUBECONFIG or give --kubeconfig")
    return _resolve(_merged(there), context, namespace)


def _in_cluster(namespace: str | None) -> Connection:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    try:
        headers, own = _account(), (ACCOUNT / "namespace").read_text().strip()
        tls = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    except OSError as error:
        raise NoConnection(f"no kubeconfig, and this pod has no service account token: {error}") from None
    return Connection(f"https://{host}:{port}", namespace or own, headers, _account, tls)


def _account() -> dict[str, str]:
    """Raises OSError."""
    return {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}"}


def _merged(paths: list[Path]) -> Raw:
    """As kubectl does: of entries with one name the first counts. Files that entries name are beside their own."""
    whole: Raw = {"clusters": {}, "users": {}, "contexts": {}, "current-context": ""}
    for path in paths:
        try:
            read = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise NoConnection(f"{path}: no kubeconfig: {error}") from None
        if not isinstance(read, dict):
            raise NoConnection(f"{path}: no kubeconfig: it is no mapping")
        whole["current-context"] = whole["current-context"] or read.get("current-context") or ""
        for kind, entry in (("clusters", "cluster"), ("users", "user"), ("contexts", "context")):
            for one in read.get(kind) or []:
                body = {**(one.get(entry) or {}), "_folder": path.parent}
                whole[kind].setdefault(one.get("name", ""), body)
    return whole


def _resolve(config: Raw, context: str | None, namespace: str | None) -> Connection:
    name = context or config["current-context"]
    if not name:
        raise NoConnection(f"the kubeconfig has no current-context: give --context, one of {_known(config)}")
    chosen = _entry(config, "contexts", name)
    cluster = _entry(config, "clusters", chosen.get("cluster", ""))
    user = _entry(config, "users", chosen["user"]) if chosen.get("user") else {}
    server = str(cluster.get("server", "")).rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise NoConnection(f"the kubeconfig's cluster {chosen.get('cluster')!r} has no server URL")
    headers, credential = _authentication(user)
    return Connection(
        server, namespace or chosen.get("namespace") or "default", headers, lambda: _authentication(user)[0],
        _tls(cluster, user | credential) if server.startswith("https://") else None,
        cluster.get("tls-server-name"), cluster.get("proxy-url"),
    )  # fmt: skip


def _known(config: Raw) -> str:
    return ", ".join(sorted(config["contexts"])) or "none"


def _entry(config: Raw, kind: str, name: str) -> Raw:
    if name not in config[kind]:
        known = sorted(config[kind])
        words = f"the kubeconfig has no {kind[:-1]} {name!r}{nearest(name, known)}"
        raise NoConnection(f"{words}: it has {', '.join(known) or 'none'}")
    found: Raw = config[kind][name]
    return found


def _authentication(user: Raw) -> tuple[dict[str, str], Raw]:
    """Headers, and what an exec plugin gives in the place of the user's certificate."""
    headers, credential = {}, dict[str, Any]()
    if "auth-provider" in user:
        raise NoConnection("the kubeconfig's user has an auth-provider, which is deprecated: use an exec plugin, such "
            "as kubelogin")
    if "exec" in user:
        credential = _exec(user["exec"])
    try:
        file = user.get("tokenFile")
        token = credential.get("token") or (_beside(user, file).read_text().strip() if file else user.get("token"))
    except OSError as error:
        raise NoConnection(f"the kubeconfig's tokenFile cannot be read: {error}") from None
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif "username" in user:
        pair = base64.b64encode(f"{user['username']}:{user.get('password', '')}".encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    headers |= {"Impersonate-User": user["as"]} if user.get("as") else {}
    return headers, credential


def _exec(plugin: Raw) -> Raw:
    """What a credential plugin answers (client.authentication.k8s.io). Raises NoConnection with its words."""
    command, version = [plugin.get("command", ""), *(plugin.get("args") or [])], plugin.get("apiVersion", "")
    given = {one["name"]: one["value"] for one in plugin.get("env") or []}
    asked = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    environment = {**os.environ, **given, "KUBERNETES_EXEC_INFO": json.dumps(asked)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=EXEC_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        hint = f"; {plugin['installHint'].strip()}" if plugin.get("installHint") else ""
        raise NoConnection(f"the kubeconfig's credential plugin {command[0]!r} did not run: {error}{hint}") from None
    try:
        status: Raw = json.loads(done.stdout)["status"]
    except (ValueError, KeyError, TypeError):
        words = done.stderr.strip() or f"it ended with {done.returncode} and no credential"
        raise NoConnection(f"the kubeconfig's credential plugin {command[0]!r} failed: {words}") from None
    return {
        "token": status.get("token"), "_certificate": status.get("clientCertificateData"),
        "_key": status.get("clientKeyData"),
    }


def _beside(entry: Mapping[str, Any], path: str) -> Path:
    folder: Path = entry["_folder"]
    return folder / path


def _tls(cluster: Raw, user: Raw) -> ssl.SSLContext:
    try:
        authority = _text(cluster, "certificate-authority")
        tls = ssl.create_default_context(cadata=authority or None)
        tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # python 3.13's: many clusters' own authorities do not pass it
        if cluster.get("insecure-skip-tls-verify"):
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        certificate = user.get("_certificate") or _text(user, "client-certificate")
        key = user.get("_key") or _text(user, "client-key")
        if bool(certificate) != bool(key):
            raise ValueError("client-certificate and client-key are needed together")
        if certificate:
            _load_pair(tls, certificate, key)
    except (OSError, ValueError, binascii.Error) as error:  # ssl.SSLError is an OSError
        raise NoConnection(f"the kubeconfig's certificates cannot be used: {error}") from None
    return tls


def _text(entry: Raw, name: str) -> str:
    """Of a PEM that lies in the kubeconfig as <name>-data, or beside it."""
    if data := entry.get(f"{name}-data"):
        return base64.b64decode("".join(data.split()), validate=True).decode()
    return _beside(entry, entry[name]).read_text() if entry.get(name) else ""


def _load_pair(tls: ssl.SSLContext, certificate: str, key: str) -> None:
    """OpenSSL reads them from files only; these are the user's alone and gone at once."""
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        pair = Path(folder) / "pair.pem"
        pair.touch(mode=0o600)
        pair.write_text(f"{certificate}\n{key}")
        tls.load_cert_chain(pair)
