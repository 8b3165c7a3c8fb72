"""Kubernetes' own types, as far as `spec.pods` and `spec.networkPolicy` take them: structural schemas, as data.

The CRD carries their outlines, so that `kubectl apply` refuses what would only be refused when pods are made; `misfits`
reads all of them in python. Fields that a later Kubernetes adds pass, but where a schema is closed. """

import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

OPEN, INT_OR_STRING = "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"
FOREIGN = "x-foreign"  # marks a schema as Kubernetes' own: its objects get no defaults of ours
LABEL_VALUE = "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
LABEL_KEY = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
DNS_LABEL = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
ENV_NAME = "^[-._a-zA-Z][-._a-zA-Z0-9]*$"
ENV_VALUE_MAX = 131_072  # Linux starts no process with a longer one
ANNOTATIONS_MAX = 262_144


def text(length: int = 1024, pattern: str | None = None, least: int = 0) -> Schema:
    return (
        {"type": "string", "maxLength": length}
        | ({"pattern": pattern} if pattern else {})
        | ({"minLength": least} if least else {})
    )


def choice(*values: str) -> Schema:
    return {"type": "string", "enum": [*values]}


def integer(least: int, most: int = 2**53 - 1) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def items(of: Schema, most: int = 256) -> Schema:
    return {"type": "array", "items": of, "maxItems": most}


def mapping(of: Schema, most: int = 256) -> Schema:
    return {"type": "object", "additionalProperties": of, "maxProperties": most}


def obj(needs: str = "", **properties: Schema) -> Schema:
    """Of any further fields. `needs`: the required ones, by spaces."""
    return {"type": "object", "properties": properties, OPEN: True} | ({"required": needs.split()} if needs else {})


def outline(schema: Schema, levels: int = 1) -> Schema:
    """The fields and their types, for the CRD, which must stay small. It is open: a field that the API server cut off
    could not be refused.
    """
    if "items" in schema:
        return {**schema, "items": outline(schema["items"], levels)}
    if "properties" not in schema:
        return schema
    inner = (
        {"properties": {name: outline(child, levels - 1) for name, child in schema["properties"].items()}}
        if levels
        else {}
    )
    return {key: value for key, value in schema.items() if key != "properties"} | {OPEN: True} | inner


def closed(needs: str = "", **properties: Schema) -> Schema:
    return {key: value for key, value in obj(needs, **properties).items() if key != OPEN}


NAME, STRING, BOOL, ID = text(253), text(4096), {"type": "boolean"}, integer(0, 2**31 - 1)
AMOUNT: Schema = {INT_OR_STRING: True}
LABELS, ANNOTATIONS = mapping(text(63, LABEL_VALUE)), mapping(text(ANNOTATIONS_MAX))
KEY_OF = obj("key", name=NAME, key=NAME, optional=BOOL)
FIELD = obj("fieldPath", fieldPath=NAME, apiVersion=NAME)
RESOURCE_FIELD = obj("resource", resource=NAME, containerName=NAME, divisor=AMOUNT)
ENV_SOURCES = ("configMapKeyRef", "secretKeyRef", "fieldRef", "resourceFieldRef", "fileKeyRef")
ENV_VAR = obj(
    "name", name=text(1024, ENV_NAME), value=text(ENV_VALUE_MAX),
    valueFrom=obj(
        configMapKeyRef=KEY_OF, secretKeyRef=KEY_OF, fieldRef=FIELD, resourceFieldRef=RESOURCE_FIELD, fileKeyRef=obj(),
    ),
)  # fmt: skip
ENV_FROM = obj(
    prefix=text(1024),
    configMapRef=obj("name", name=NAME, optional=BOOL),
    secretRef=obj("name", name=NAME, optional=BOOL),
)

FILES = items(obj("key path", key=NAME, path=STRING, mode=ID))
FROM_FIELDS = items(obj("path", path=STRING, mode=ID, fieldRef=FIELD, resourceFieldRef=RESOURCE_FIELD))
CONFIG_MAP = obj(name=NAME, items=FILES, defaultMode=ID, optional=BOOL)
SECRET = obj(secretName=NAME, items=FILES, defaultMode=ID, optional=BOOL)
PROJECTED = obj(
    defaultMode=ID, sources=items(obj(configMap=obj(), secret=obj(), downwardAPI=obj(), serviceAccountToken=obj()))
)
CSI = obj(
    "driver",
    driver=NAME,
    fsType=NAME,
    readOnly=BOOL,
    volumeAttributes=mapping(text()),
    nodePublishSecretRef=obj(name=NAME),
)
VOLUME = obj(
    "name", name=text(63, DNS_LABEL), emptyDir=obj(medium=NAME, sizeLimit=AMOUNT),
    hostPath=obj("path", path=STRING, type=NAME),
    persistentVolumeClaim=obj("claimName", claimName=NAME, readOnly=BOOL), configMap=CONFIG_MAP, secret=SECRET,
    nfs=obj("server path", server=NAME, path=STRING, readOnly=BOOL), csi=CSI, projected=PROJECTED,
    downwardAPI=obj(items=FROM_FIELDS, defaultMode=ID),
    ephemeral=obj(volumeClaimTemplate=obj("spec", spec=obj(), metadata=obj())),
    image=obj(reference=STRING, pullPolicy=NAME),
)  # fmt: skip
VOLUME_MOUNT = obj(
    "mountPath name", name=text(63, DNS_LABEL), mountPath=text(4096, "^/[^:]*$"), readOnly=BOOL, subPath=STRING,
    subPathExpr=STRING,
    mountPropagation=choice("None", "HostToContainer", "Bidirectional"),
    recursiveReadOnly=choice("Disabled", "IfPossible", "Enabled"),
)  # fmt: skip
RESOURCES = obj(
    requests=mapping(AMOUNT, 64), limits=mapping(AMOUNT, 64), claims=items(obj("name", name=NAME, request=NAME), 16)
)

PROFILE = obj("type", type=NAME, localhostProfile=STRING)
SE_LINUX = obj(level=NAME, role=NAME, type=NAME, user=NAME)
WHO: dict[str, Any] = {
    "runAsUser": ID,
    "runAsGroup": ID,
    "runAsNonRoot": BOOL,
    "seccompProfile": PROFILE,
    "appArmorProfile": PROFILE,
    "seLinuxOptions": SE_LINUX,
}
CONTAINER_SECURITY = obj(
    **WHO, privileged=BOOL, readOnlyRootFilesystem=BOOL, allowPrivilegeEscalation=BOOL, procMount=NAME,
    capabilities=obj(add=items(NAME, 64), drop=items(NAME, 64)), windowsOptions=obj(),
)  # fmt: skip
POD_SECURITY = obj(
    **WHO, fsGroup=ID, supplementalGroups=items(ID), fsGroupChangePolicy=choice("OnRootMismatch", "Always"),
    supplementalGroupsPolicy=NAME,
    sysctls=items(obj("name value", name=NAME, value=STRING), 64), windowsOptions=obj(),
)  # fmt: skip

EXPRESSION = closed(
    "key operator",
    key=text(317, LABEL_KEY),
    operator=choice("In", "NotIn", "Exists", "DoesNotExist"),
    values=items(text(63, LABEL_VALUE)),
)
SELECTOR = closed(matchLabels=LABELS, matchExpressions=items(EXPRESSION, 64))
# Closed, for a misspelt field of a peer would let in more than was meant.
NETWORK_PEER = closed(
    podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=closed("cidr", cidr=NAME, **{"except": items(NAME, 64)})
)

TOLERATION = obj(key=NAME, operator=NAME, value=NAME, effect=NAME, tolerationSeconds=integer(-(2**53) + 1))
SPREAD = obj(
    "maxSkew topologyKey whenUnsatisfiable",
    maxSkew=integer(1, 2**31 - 1),
    topologyKey=NAME,
    whenUnsatisfiable=choice("DoNotSchedule", "ScheduleAnyway"),
)
CONTAINER = obj(
    "name image", name=text(63, DNS_LABEL), image=text(1024, least=1), command=items(text(ENV_VALUE_MAX)),
    args=items(text(ENV_VALUE_MAX)), workingDir=STRING,
    env=items(ENV_VAR), envFrom=items(ENV_FROM), volumeMounts=items(VOLUME_MOUNT), resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    imagePullPolicy=choice("Always", "IfNotPresent", "Never"), restartPolicy=NAME,
    ports=items(obj("containerPort", containerPort=integer(1, 65535))),
    tty=BOOL, stdin=BOOL, lifecycle=obj(), startupProbe=obj(), readinessProbe=obj(), livenessProbe=obj(),
)  # fmt: skip
NAMED = items(obj("name", name=NAME))
# Those fields of a PodSpec that spec.pods passes on.
POD_SPEC = obj(
    nodeSelector=LABELS, tolerations=items(TOLERATION),
    affinity=obj(nodeAffinity=obj(), podAffinity=obj(), podAntiAffinity=obj()),
    topologySpreadConstraints=items(SPREAD, 64), initContainers=items(CONTAINER, 32),
    imagePullSecrets=items(obj(name=NAME), 64),
    securityContext=POD_SECURITY, priorityClassName=NAME, priority=integer(-(2**31), 2**31 - 1), preemptionPolicy=NAME,
    schedulerName=NAME,
    runtimeClassName=NAME, serviceAccountName=NAME, serviceAccount=NAME, automountServiceAccountToken=BOOL,
    enableServiceLinks=BOOL, hostNetwork=BOOL,
    hostPID=BOOL, hostIPC=BOOL, hostUsers=BOOL, hostname=text(63, DNS_LABEL), subdomain=text(63, DNS_LABEL),
    setHostnameAsFQDN=BOOL, shareProcessNamespace=BOOL,
    hostAliases=items(obj("ip", ip=NAME, hostnames=items(NAME))),
    dnsPolicy=choice("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    dnsConfig=obj(nameservers=items(NAME), searches=items(NAME)),
    terminationGracePeriodSeconds=integer(0, 86400), overhead=mapping(AMOUNT),
    readinessGates=items(obj("conditionType", conditionType=NAME)),
    schedulingGates=NAMED, resourceClaims=NAMED, os=obj("name", name=NAME),
)  # fmt: skip

TYPES: dict[str, type] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
WORDS = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text (put it in quotes)",
    "boolean": "true or false",
    "integer": "a whole number",
}


def misfits(schema: Schema, value: Any, path: str) -> Iterator[str]:
    """What is wrong with the value, as `path: fix`, one each."""
    kind = schema.get("type")
    if kind is None:
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path}: must be a quantity: a text (put it in quotes), or a whole number"
    elif not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        yield f"{path}: must be {WORDS[kind]}"
    else:
        yield from {"object": _object, "array": _array}.get(kind, _scalar)(schema, value, path)


def _array(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if len(value) > schema["maxItems"]:
        yield f"{path}: has {len(value)} items: at most {schema['maxItems']}"
        return
    for index, item in enumerate(value):
        yield from misfits(schema["items"], item, f"{path}[{index}]")


def _object(schema: Schema, value: Any, path: str) -> Iterator[str]:
    yield from (f"{path}.{name}: is missing: add it" for name in schema.get("required", ()) if name not in value)
    if len(value) > schema.get("maxProperties", 4096):
        yield f"{path}: has {len(value)} entries: too many"
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name, item in value.items():
        child = known.get(name, others) if isinstance(name, str) else {"type": "string"}
        if not isinstance(name, str):
            yield f"{path}: {name!r} must be a text (put it in quotes)"
        elif child is not None:
            yield from misfits(child, item, f"{path}.{name}")
        elif OPEN not in schema:
            yield f"{path}.{name}: unknown field: remove it or correct its name"


def _scalar(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if value not in schema.get("enum", (value,)):
        yield f"{path}: must be one of {', '.join(schema['enum'])}"
    elif schema["type"] == "integer" and not schema["minimum"] <= value <= schema["maximum"]:
        yield f"{path}: must be from {schema['minimum']} to {schema['maximum']}"
    elif schema["type"] == "string":
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{path}: must have {schema.get('minLength', 0)} to {schema['maxLength']} characters"
        elif "pattern" in schema and not re.fullmatch(schema["pattern"], value, re.ASCII | re.DOTALL):
            yield f"{path}: must match {schema['pattern']}"
