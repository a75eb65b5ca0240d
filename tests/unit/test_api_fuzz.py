"""The API fuzzed from its own description: no mistake of ours, and nothing it does not describe."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.support.apis import Rig, prompt

from kvstrata.config import load_config
from kvstrata.control.app import build
from kvstrata.control.jobs import Work
from kvstrata.control.verbs import warm

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
ANSWER_S = 20.0

_, APP = build(load_config(environ={}, overrides={"host.capacity": "1MiB"}))
schema = schemathesis.openapi.from_dict(APP.openapi())


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    async def nobody(job: Work, url: httpx.URL, asked: warm.Warm) -> None:
        """No engine is asked: who knows what listens where chance points."""

    with tempfile.TemporaryDirectory(prefix="kv-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "_compute", nobody)
        rig = Rig(Path(name))
        with rig.engine() as engine:
            engine.tell()
            engine.store(prompt(4))
        yield rig
        assert rig.node is not None
        rig.node.check_integrity()
        rig.close()


@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_is_answered(case: schemathesis.Case[Any], rig: Rig) -> None:
    answer = case.call(base_url=rig.url, timeout=ANSWER_S)
    case.validate_response(answer, checks=CHECKS)
