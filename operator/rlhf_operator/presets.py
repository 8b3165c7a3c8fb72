"""What every job inherits from the platform that it runs on, and may override: an image and additions to its pods.

A RayCluster is made of what the presets are when it is made; one that runs stays as it is when they change.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from rlhf_api.base import Model
from rlhf_api.job import PodsSpec
from rlhf_api.overrides import pods_misfits, pods_problems
from rlhf_operator.merge import deep_merge, merge_named

Raw = dict[str, Any]
# Lists of the pods whose items have names: the job's item replaces its namesake. Other lists of both are added up.
NAMED = {"env": "name", "volumes": "name", "volumeMounts": "mountPath", "imagePullSecrets": "name",
    "initContainers": "name"}


class InvalidPresets(Exception):
    """Presets that cannot be used; the message names the field."""


class _Content(Model):
    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    pods: PodsSpec = Field(default_factory=PodsSpec)


@dataclass(frozen=True, slots=True)
class Presets:
    """`image`: of jobs without one. `pods`: of each kind of pod what lies below the job's own spec.pods, raw."""

    image: str | None = None
    pods: Raw = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.image or self.pods)

    def under(self, raw: Raw) -> Raw:
        """A raw job with what it inherits. What is no mapping is left for the schema to refuse."""
        spec = raw.get("spec")
        if not self or not isinstance(spec, dict):
            return raw
        pods, placement = spec.get("pods"), spec.get("placement")
        own: Raw = pods if isinstance(pods, dict) else {}
        separated = isinstance(placement, dict) and placement.get("mode") == "Separated"
        kinds = [kind for kind in self.pods if separated or kind != "rollout"]  # Colocated there are no such pods
        merged = own | {kind: _pod(self.pods[kind], own.get(kind)) for kind in kinds}
        image = {"image": self.image} if self.image and spec.get("image") is None else {}
        return {**raw, "spec": {**spec, **image, **({"pods": merged} if isinstance(pods, dict | None) else {})}}


NO_PRESETS = Presets()


def _pod(preset: Raw, own: Any) -> Any:
    if own is not None and not isinstance(own, dict):
        return own
    given = own or {}
    lists = {
        key: merge_named(value, given[key], NAMED[key]) if key in NAMED else [*value, *given[key]]
        for key, value in preset.items() if isinstance(value, list) and _objects(given.get(key))
    }
    return deep_merge(preset, given) | lists


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read(text: str) -> Presets:
    """YAML with `image` and `pods`, of which both may be absent. Raises InvalidPresets."""
    try:
        raw = yaml.safe_load(text) or {}
        content = _Content.model_validate(raw, by_alias=True, by_name=False)
    except yaml.YAMLError as error:
        raise InvalidPresets(f"not YAML: {error}") from None
    except ValidationError as error:
        words = (f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())
        raise InvalidPresets("; ".join(words)) from None
    if found := pods_misfits(content.pods) or pods_problems(content.pods):
        raise InvalidPresets("; ".join(found))
    return Presets(content.image, raw.get("pods") or {})
