"""models -> CustomResourceDefinition. `python -m rlhf_api.crd` prints it.

pydantic's JSON schema is turned into a structural schema: $refs inlined, "or null" folded, titles dropped, the defaults
of nested objects made explicit (so that the API server fills them in), CEL rules hung where `rules.py` says. """

import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from rlhf_api import GROUP, KIND, PLURAL, VERSION
from rlhf_api.job import RLHFJobSpec
from rlhf_api.kubernetes import FOREIGN
from rlhf_api.rules import RULES, Rule, transitions
from rlhf_api.status import RLHFJobStatus

Schema = dict[str, Any]
KEEP = (
    "type", "description", "enum", "default", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "maxProperties", "pattern", "format", "required",
)
# The API server's CEL cost estimate needs a bound on every string and list that a rule walks.
STRING_MAX, LIST_MAX = 1024, 256

# Of two versions of a job: an edit of the spec leaves the status as it was.
STATUS_WRITTEN = "has(self.status) && (!has(oldSelf.status) || self.status != oldSelf.status)"

COLUMNS = (
    ("Phase", "string", ".status.phase", 0), ("Reason", "string", ".status.reason", 0),
    ("Step", "string", ".status.progress.display", 0),
    ("Reward", "string", ".status.progress.reward", 0), ("Tok/s", "string", ".status.progress.tokensPerSecond", 0),
    ("ETA", "string", ".status.progress.eta", 0), ("Restarts", "integer", ".status.restarts.total", 0),
    ("GPUs", "integer", ".status.gpus", 0), ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Queue", "string", ".status.queue", 1), ("Cluster", "string", ".status.clusterName", 1),
    ("Checkpoint", "string", ".status.progress.checkpoint.path", 1), ("Mode", "string", ".status.mode", 1),
    ("Goodput", "string", ".status.goodput", 1),
)


def structural(node: Schema, defs: Schema, ours: bool = True) -> Schema:
    """One node of pydantic's schema as a node of a structural schema. Kubernetes' own types are not `ours`."""
    node = _resolve(node, defs)
    ours = ours and FOREIGN not in node
    out = {key: node[key] for key in KEEP if key in node and node[key] is not None}
    out.update({key: value for key, value in node.items() if key.startswith("x-kubernetes-")})
    if "description" in out:  # a docstring's lines are broken where the source's are
        out["description"] = " ".join(out["description"].split())
    _bounds(node, out)
    if "properties" in node:
        out["properties"] = _properties(node, defs, ours)
        out["required"] = sorted(node.get("required", [])) or None
    elif node.get("type") == "object":
        _free(node, out, defs)
    if "items" in node:
        out["items"] = structural(node["items"], defs, ours)
    return {key: value for key, value in out.items() if value is not None}


def _resolve(node: Schema, defs: Schema) -> Schema:
    """Follow a $ref and fold `X or null` to X; a field's own description and default win over its type's."""
    own = {key: value for key, value in node.items() if key not in ("$ref", "anyOf", "allOf")}
    if "anyOf" in node:
        (inner,) = [option for option in node["anyOf"] if option.get("type") != "null"]
        return {**_resolve(inner, defs), **own}
    if "$ref" in node:
        return {**_resolve(defs[node["$ref"].removeprefix("#/$defs/")], defs), **own}
    if "const" in node:
        return {**own, "enum": [node["const"]]}
    return node


def _bounds(node: Schema, out: Schema) -> None:
    """exclusive* is a boolean beside minimum/maximum in a CRD; strings and lists get an upper bound."""
    for side, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if side in node:
            out[bound], out[side] = node[side], True
    if node.get("type") == "string" and "enum" not in node and "format" not in node:
        out.setdefault("maxLength", STRING_MAX)
    if node.get("type") == "array":
        out.setdefault("maxItems", LIST_MAX)


def _free(node: Schema, out: Schema, defs: Schema) -> None:
    """A mapping: of one type, or of anything."""
    values = node.get("additionalProperties")
    if isinstance(values, dict) and values:
        out["additionalProperties"] = structural(values, defs)
    else:
        out["x-kubernetes-preserve-unknown-fields"] = True


def _properties(node: Schema, defs: Schema, ours: bool) -> dict[str, Schema]:
    """An object of ours whose fields all have defaults defaults to {}, so that the API server writes the inner ones;
    one that may be absent (whose default is null) has none.
    """
    out = {name: structural(child, defs, ours) for name, child in node["properties"].items()}
    for name, child in node["properties"].items():
        filled = out[name].get("type") == "object" and "properties" in out[name] and not out[name].get("required")
        if ours and filled and not {"default", FOREIGN} & set(child) and name not in node.get("required", []):
            out[name]["default"] = {}
    return out


def _schema(model: type[RLHFJobSpec] | type[RLHFJobStatus]) -> Schema:
    raw = model.model_json_schema(by_alias=True)
    return structural(raw, raw.get("$defs", {}))


def _status_schema() -> Schema:
    """Without defaults: a status holds what was observed, and the API server observes nothing."""
    schema = _schema(RLHFJobStatus)
    _drop_defaults(schema)
    return schema


def _drop_defaults(node: Schema) -> None:
    node.pop("default", None)
    for child in (*node.get("properties", {}).values(), *([node["items"]] if "items" in node else [])):
        _drop_defaults(child)


def _place(root: Schema, rule: Rule) -> None:
    node = root
    for part in rule.path.split(".") if rule.path else []:
        node = node["properties"][part.removesuffix("[]")]
        node = node["items"] if part.endswith("[]") else node
    node.setdefault("x-kubernetes-validations", []).append({"rule": rule.cel, "message": rule.message})


def _edits(rules: Sequence[Rule]) -> Schema:
    """All rules of edits as one at the root. A write of the status cannot change the spec, so there it ends at the
    status that differs: to compare the specs would be a third of the API server's work for a report.
    """
    kept = [re.sub(r"\b(self|oldSelf)[.]", r"\1.spec.", f"({rule.cel})") for rule in rules]
    told = " + ".join(f"({cel} ? '' : '{rule.message}. ')" for cel, rule in zip(kept, rules, strict=True))
    return {
        "rule": f"{STATUS_WRITTEN} || {' && '.join(kept)}", "message": "spec: what may not change was changed",
        "messageExpression": f"({told}).trim()", "fieldPath": ".spec",
    }


def job_schema() -> Schema:
    spec = _schema(RLHFJobSpec)
    root: Schema = {
        "type": "object", "required": ["spec"],
        "description": "One RLHF training run.",
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
            "spec": spec, "status": _status_schema(),
        },
    }
    for rule in RULES:
        _place(root, rule)
    root.setdefault("x-kubernetes-validations", []).append(_edits(transitions(list(spec["properties"]))))
    return root


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as a plain object."""
    columns = [{"name": n, "type": t, "jsonPath": p, **({"priority": w} if w else {})} for n, t, p, w in COLUMNS]
    version = {
        "name": VERSION, "served": True, "storage": True, "subresources": {"status": {}},
        "additionalPrinterColumns": columns, "schema": {"openAPIV3Schema": job_schema()},
    }
    names = {
        "plural": PLURAL, "singular": "rlhfjob", "kind": KIND, "listKind": f"{KIND}List", "shortNames": ["rlhf"],
        "categories": ["all"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


class _Plain(yaml.SafeDumper):
    """Writes a repeated value twice instead of an anchor, which few tools and no reader expect in a manifest."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml() -> str:
    return yaml.dump(crd(), Dumper=_Plain, sort_keys=False, width=160)


if __name__ == "__main__":
    sys.stdout.write(crd_yaml())
