"""What the documents say to kubectl and to the API server, as far as only these can tell."""

import re

import pytest
import yaml

from hack.generate import dump
from hack.kubectl import Kube
from tests.blocks import blocks, commands

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_every_manifest_of_the_documents_is_accepted(operator: Kube) -> None:
    """By the CRD's schema, its rules and its transition rules, as a job of `kubectl apply`."""
    found = [one for block in blocks("yaml") for one in yaml.safe_load_all(block.text) if one.get("kind") == "RLHFJob"]
    assert len(found) >= 8, "a whole one for every task"
    told = operator.run("apply", "--dry-run=server", "-f", "-", text=dump(*found))
    assert told.count("created (server dry run)") == len(found), told


def test_kubectl_knows_every_option_that_the_documents_give_it(operator: Kube) -> None:
    plain = [words for _, words in commands() if words[0] == "kubectl" and words[1] != "rlhf"]
    everywhere, verbs = operator.run("options"), re.findall(r"^  ([a-z-]+) ", operator.run("help"), re.MULTILINE)
    assert plain
    for words in plain:
        named = [word for word in words[1:] if not word.startswith("-")]
        at = next(i for i, word in enumerate(named) if word in verbs)
        told = operator.run(*named[at : at + 2], "--help") + everywhere  # `create configmap` has a help of its own
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given <= {*re.findall(r"(?<!\w)--?[a-z][a-z-]*", told)}, words
