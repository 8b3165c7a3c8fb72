"""Specs made from the schema, at the real API server: each is refused there, refused by the operator, or planned into
objects that it takes. `RLHF_SPECS=10000 RLHF_SEED=7` takes more and other ones."""

import json
import os
from collections import Counter

import pytest

from hack.cluster import settings
from hack.cluster.kube import Api, ApiError
from hack.kubectl import Kube
from rlhf_operator.kinds import JOBS, OF_KIND, Kind
from tests.api.generated import PLANNED, jobs, outcome, planned
from tests.api.specs import Object

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]
COUNT, SEED = int(os.environ.get("RLHF_SPECS", "300")), int(os.environ.get("RLHF_SEED", "3"))
REFUSALS = (400, 413, 422)


def asked(api: Api, kind: Kind, body: Object) -> Object:
    """What the API server would make of it. Raises ApiError for what it refuses."""
    prefix = f"/apis/{kind.group}" if kind.group else "/api"
    path = f"{prefix}/{kind.version}/namespaces/default/{kind.plural}"
    return api.create(f"{path}?dryRun=All&fieldValidation=Strict", body)


def fate(api: Api, raw: Object) -> str:
    """Raises for a fault of ours: another answer than a refusal, or a plan that is not taken."""
    try:
        job = asked(api, JOBS, raw)
    except ApiError as refusal:
        assert refusal.code in REFUSALS, f"{refusal.code}: {refusal}"
        return "refused by the API server"
    end = outcome(job)
    for body in planned(job) if end == PLANNED else []:
        try:
            asked(api, OF_KIND[body["kind"]], body)
        except ApiError as refusal:
            if refusal.code not in REFUSALS or ".template." not in str(refusal):
                raise
            return "refused by the API server for what spec.pods adds to a pod"
    return end


def test_every_spec_is_refused_or_becomes_objects_that_are_taken(operator: Kube) -> None:
    api = Api.from_kubeconfig(settings.from_environment().kubeconfig)
    ends, faults = Counter[str](), []
    for number, raw in enumerate(jobs(SEED, COUNT)):
        try:
            ends[fate(api, raw)] += 1
        except (ApiError, AssertionError) as error:
            faults.append(f"number {number} of seed {SEED}: {str(error)[:400]}: {json.dumps(raw)[:600]}")
    print(dict(ends))
    assert not faults, "\n".join(faults[:5])
    assert ends[PLANNED] > COUNT / 10, "hardly one is right: they try nothing"
