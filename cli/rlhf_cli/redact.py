"""What must not leave a cluster in a support archive, taken out. Pure."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "REDACTED"
# Keys whose text is a secret, whatever it looks like.
SECRET = re.compile(
    r"(?i)(^|[_\-.])(pass(word|wd)?|secrets?|tokens?|api[_\-]?key|access[_\-]?key(id)?|private[_\-]?key|credentials?"
    r"|auth(orization)?|cookie|dsn)$|password|secret|apikey|accesskey|privatekey",
)
ANNOTATIONS = ("kubectl.kubernetes.io/last-applied-configuration",)  # the whole object once more
# Secrets by their own looks, in any text.
LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abprs]-[\w\-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w\-]{30,}|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL,
)
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]*://)[^/\s:@\"']*:[^/\s@\"']+@")
HEADER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=_\-.~]{8,}")
ASSIGNED = re.compile(r"""(?ix)
    \b([\w.\-]*(?:password|passwd|secret|token|api[_\-]?key|access[_\-]?key|private[_\-]?key))
    (["']?\s*[=:]\s*["']?)(?!\s|\d+(?:\s|,|$))([^\s"',;&]{4,})""")  # fmt: skip


def text(given: str) -> str:
    given = LOOKS.sub(HIDDEN, given)
    given = URL.sub(rf"\g<scheme>{HIDDEN}@", given)
    given = HEADER.sub(rf"\1 {HIDDEN}", given)
    return ASSIGNED.sub(rf"\1\2{HIDDEN}", given)


def value(given: Any, key: str = "") -> Any:
    """An object of Kubernetes. Every literal of an environment goes: nobody knows what it holds."""
    if isinstance(given, Mapping):
        return {name: _member(given, name, one) for name, one in given.items()}
    if isinstance(given, list):
        return [value(one, key) for one in given]
    if isinstance(given, str):
        return HIDDEN if given and SECRET.search(key) else text(given)
    return given


def _member(owner: Mapping[str, Any], name: str, one: Any) -> Any:
    if name == "value" and "name" in owner and isinstance(one, str):  # an EnvVar
        return HIDDEN
    if name in ANNOTATIONS:
        return HIDDEN
    return value(one, name)
