"""Variables of the environment that begin as options do, and are none."""

from __future__ import annotations

import re
from collections.abc import Mapping

OTHER_VARIABLES: Mapping[str, str] = {
    "KVSTRATA_API_TOKEN": "tokens of the HTTP API, as in `api.token_file`; a bare one may write",
    "KVSTRATA_CONFIG": "the configuration file (`.toml`, `.yaml` or `.yml`)",
    "KVSTRATA_MODEL_CACHE": "where the demo and the tests keep the models that they prepared",
    "KVSTRATA_REQUIRE_ENGINE": "`1`: the engine tests fail, not skip, where vLLM is missing; "
    "`sglang`: where SGLang is",
}
"""KVSTRATA_* variables that are no option."""

# Kubernetes describes a service named "kvstrata..." to every pod in variables of these shapes.
_KUBERNETES = re.compile(
    r"KVSTRATA(_[A-Z0-9_]+)?_(SERVICE_HOST=.*|SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+"
    r"|PORT=[a-z]+://.*|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)"
)


def of_kubernetes(name: str, value: str) -> bool:
    """Whether a variable only describes a service."""
    return _KUBERNETES.fullmatch(f"{name}={value}") is not None
