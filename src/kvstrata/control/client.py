"""A client of the HTTP API: typed, small, and checked against the API's own description."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from typing_extensions import Unpack

from kvstrata import errors
from kvstrata.control import problems
from kvstrata.control.verbs.about import Health, Ready, Status, Version
from kvstrata.control.verbs.clear import Cleared, Flushed
from kvstrata.control.verbs.explain import Explained
from kvstrata.control.verbs.fleet import Fleet
from kvstrata.control.verbs.holdings import Chunks, Inspected
from kvstrata.control.verbs.jobs import Job, Jobs
from kvstrata.control.verbs.lookup import Found
from kvstrata.control.verbs.namespaces import Namespaces
from kvstrata.control.verbs.records import Records
from kvstrata.control.verbs.route import Routed
from kvstrata.control.verbs.tenants import Held, Pinned, Pins, Unpinned
from kvstrata.control.verbs.upkeep import Reloaded, Undrained
from kvstrata.errors import DeadlineExceeded, Incompatible, KVStrataError, NodeUnavailable

M = TypeVar("M", bound=BaseModel)

TIMEOUT_S = 130.0
"""More than any verb takes."""


class Prompting(TypedDict, total=False):
    """A prompt, as `Client.lookup` takes it: one of the first four, and whose it is."""

    tokens: Sequence[int]
    text: str
    messages: Sequence[Mapping[str, Any]]
    keys: Sequence[str]
    model: str
    namespace: str
    salt: str


class ApiProblem(KVStrataError):
    """The API answered with a problem that no other error stands for.

    Args:
        problem: as it came.
    """

    def __init__(self, problem: problems.Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Client:
    """Asks a node's API. Thread-safe; a context manager.

    Args:
        url: ``http://127.0.0.1:7780``, ``https://...`` or ``unix:/path``.
        token: shown where one is needed.
        timeout_s: for any answer.
        certificates: of the authority that signed the API's certificate, for HTTPS; None: the
            system's.
        transport: in the place of the network.

    Every method raises:
        NodeUnavailable: the API, or its node, does not answer.
        DeadlineExceeded: it does not answer in time.
        UsageError, TierUnavailable, ReadOnly: as the node does.
        ApiProblem: any other problem; it has the field's name.
        Incompatible: what answers is no such API.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        certificates: Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        if url.startswith("unix:"):
            transport = transport or httpx.HTTPTransport(uds=url.removeprefix("unix:"))
            url = "http://localhost"
        verify = ssl.create_default_context(cafile=certificates) if certificates else True
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            transport=transport,
            verify=verify,
            trust_env=False,
        )

    def health(self) -> Health:
        """Whether the API's process lives."""
        return self._get("/v1/health", Health)

    def ready(self) -> Ready:
        """Whether the node can be asked."""
        return self._get("/v1/ready", Ready)

    def version(self) -> Version:
        """Releases of the API and of its node."""
        return self._get("/v1/version", Version)

    def status(self) -> Status:
        """Memory, tiers, leases, counters and the last requests of the node."""
        return self._get("/v1/status", Status)

    def metrics(self) -> str:
        """The node's metrics in Prometheus' text format."""
        return self._answer("GET", "/metrics").text

    def namespaces(self) -> Namespaces:
        """The namespaces that engines told the node of."""
        return self._get("/v1/namespaces", Namespaces)

    def fleet(self) -> Fleet:
        """The nodes that share a registry with this one; none without a registry."""
        return self._get("/v1/fleet", Fleet)

    def requests(self, before: int = 0, limit: int = 100) -> Records:
        """A page of the requests' records, the latest first; ``before``: `Records.next`."""
        return self._get("/v1/requests", Records, before=before, limit=limit)

    def lookup(
        self,
        tokens: Sequence[int] | None = None,
        text: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        keys: Sequence[str] | None = None,
        model: str | None = None,
        namespace: str | None = None,
        salt: str = "",
    ) -> Found:
        """How many leading tokens of a prompt are held; one of the first four says which."""
        return self._post(
            "/v1/lookup", Found, tokens=tokens, text=text, messages=messages, keys=keys,
            model=model, namespace=namespace, salt=salt,
        )  # fmt: skip

    def explain(
        self,
        request: str | None = None,
        across_tenants: bool = False,
        **prompt: Unpack[Prompting],
    ) -> Explained:
        """Why a request had to compute, or a prompt would have to, in sentences too."""
        return self._post(
            "/v1/explain", Explained, request=request, across_tenants=across_tenants, **prompt
        )

    def route(
        self,
        nodes: Mapping[str, float],
        tokens: Sequence[int] | None = None,
        body: Mapping[str, Any] | None = None,
        model: str | None = None,
        namespace: str | None = None,
        salt: str = "",
        sent: bool = True,
    ) -> Routed:
        """Which of these nodes a prompt should go to; by name, the work before each in tokens."""
        return self._post(
            "/v1/route", Routed, nodes=nodes, tokens=tokens, body=body, model=model,
            namespace=namespace, salt=salt, sent=sent,
        )  # fmt: skip

    def flush(self) -> Flushed:
        """Wait until what was stored so far is written to the slower tiers."""
        return self._ask("POST", "/v1/flush", Flushed)

    def clear(
        self,
        everything: Literal[True] | None = None,
        keys: Sequence[str] | None = None,
        namespace: str | None = None,
        before: float | None = None,
        tiers: Sequence[str] | None = None,
        owner: str | None = None,
        tenant: str | None = None,
        salt: str = "",
    ) -> Cleared:
        """Forget everything, or what fits all that is given, in these tiers or all."""
        return self._post(
            "/v1/clear", Cleared, everything=everything, keys=keys, namespace=namespace,
            before=before, tiers=tiers, owner=owner, tenant=tenant, salt=salt,
        )  # fmt: skip

    def pin(self, name: str, ttl_s: float, **prompt: Unpack[Prompting]) -> Pinned:
        """Keep a prompt's chunks in the node's own tiers for so many seconds, or renew that."""
        return self._post("/v1/pin", Pinned, name=name, ttl_s=ttl_s, **prompt)

    def unpin(
        self, name: str, owner: str | None = None, tenant: str | None = None, salt: str = ""
    ) -> Unpinned:
        """End a pin."""
        return self._post("/v1/unpin", Unpinned, name=name, owner=owner, tenant=tenant, salt=salt)

    def pins(self, after: str = "", limit: int = 100) -> Pins:
        """A page of the pins; ``after``: `Pins.next`."""
        return self._get("/v1/pins", Pins, after=after, limit=limit)

    def quota(
        self,
        tier: str,
        nbytes: int | None,
        owner: str | None = None,
        tenant: str | None = None,
        salt: str = "",
    ) -> Held:
        """Let a tenant have so many bytes in a tier; None: no bound."""
        told = {"tier": tier, "nbytes": nbytes, "salt": salt}
        told |= {} if owner is None else {"owner": owner}
        told |= {} if tenant is None else {"tenant": tenant}
        return self._ask("POST", "/v1/quota", Held, json=told)

    def warm(
        self, url: str, model: str, prompts: Sequence[str | Sequence[int]], at_once: int = 2
    ) -> Job:
        """Begin to have an engine compute prompts."""
        return self._post("/v1/warm", Job, url=url, model=model, prompts=prompts, at_once=at_once)

    def chunks(self, tier: str = "", after: str = "", limit: int = 100) -> Chunks:
        """A page of what is held; ``after``: `Chunks.next`."""
        return self._get("/v1/chunks", Chunks, tier=tier, after=after, limit=limit)

    def inspect(
        self,
        tier: str,
        key: str,
        part: int = 0,
        namespace: str | None = None,
        orders: Sequence[str] = (),
    ) -> Inspected:
        """One object's header, verified."""
        return self._post(
            "/v1/inspect", Inspected, tier=tier, key=key, part=part, namespace=namespace,
            orders=list(orders),
        )  # fmt: skip

    def prefetch(self, **prompt: Unpack[Prompting]) -> Job:
        """Begin to bring a prompt's chunks into host memory."""
        return self._post("/v1/prefetch", Job, **prompt)

    def copy(self, source: str, target: str, **prompt: Unpack[Prompting]) -> Job:
        """Begin to copy a prompt's chunks from one tier to another."""
        return self._post("/v1/copy", Job, source=source, target=target, **prompt)

    def move(self, source: str, target: str, **prompt: Unpack[Prompting]) -> Job:
        """Begin to move them."""
        return self._post("/v1/move", Job, source=source, target=target, **prompt)

    def send(self, peer: str, **prompt: Unpack[Prompting]) -> Job:
        """Begin to have another node fetch them."""
        return self._post("/v1/send", Job, peer=peer, **prompt)

    def transcode(self, tier: str, codec: str = "") -> Job:
        """Begin to store all that a tier holds again, with another codec."""
        return self._post("/v1/transcode", Job, tier=tier, codec=codec)

    def scrub(self, tier: str) -> Job:
        """Begin to verify all that a tier holds."""
        return self._post("/v1/scrub", Job, tier=tier)

    def drain(self, end: bool = False) -> Job:
        """Have the node take no new stores, and perhaps end."""
        return self._post("/v1/drain", Job, end=end)

    def undrain(self) -> Undrained:
        """Let the node take stores again."""
        return self._ask("POST", "/v1/undrain", Undrained)

    def reload(self, config: Mapping[str, Any]) -> Reloaded:
        """Hold the node to another configuration, all of it."""
        return self._post("/v1/reload", Reloaded, config=config)

    def jobs(self, after: str = "", limit: int = 100) -> Jobs:
        """A page of the jobs, the latest first; ``after``: `Jobs.next`."""
        return self._get("/v1/jobs", Jobs, after=after, limit=limit)

    def job(self, id: str) -> Job:
        """One job."""
        return self._get(f"/v1/jobs/{quote(id, safe='')}", Job)

    def cancel(self, id: str) -> Job:
        """End a job."""
        return self._ask("POST", f"/v1/jobs/{quote(id, safe='')}/cancel", Job)

    def close(self) -> None:
        """Hang up. Repeatable."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _get(self, path: str, told: type[M], /, **query: Any) -> M:
        return self._ask("GET", path, told, params=query)

    def _post(self, path: str, told: type[M], /, **body: Any) -> M:
        given = {name: value for name, value in body.items() if value is not None}
        return self._ask("POST", path, told, json=given)

    def _ask(self, method: str, path: str, told: type[M], **what: Any) -> M:
        answer = self._answer(method, path, **what)
        try:
            return told.model_validate_json(answer.content)
        except ValidationError as error:
            raise self._no_api(answer) from error

    def _answer(self, method: str, path: str, **what: Any) -> httpx.Response:
        """A success, or what the problem stands for is raised."""
        try:
            answer = self._http.request(method, path, **what)
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"the API on {self.url} does not answer in time") from error
        except (httpx.HTTPError, OSError) as error:
            raise NodeUnavailable(f"no API answers on {self.url}: {error}") from error
        if answer.is_success:
            return answer
        try:
            problem = problems.Problem.model_validate_json(answer.content)
        except ValidationError as error:
            raise self._no_api(answer) from error
        kind = getattr(errors, problem.kind, None)
        if isinstance(kind, type) and issubclass(kind, KVStrataError) and kind in RAISED:
            raise kind(problem.detail)
        raise ApiProblem(problem)

    def _no_api(self, answer: httpx.Response) -> Incompatible:
        return Incompatible(
            f"what answers on {self.url} ({answer.status_code}) is no API of this release"
        )


RAISED = frozenset(
    {
        DeadlineExceeded,
        Incompatible,
        NodeUnavailable,
        errors.Busy,
        errors.ReadOnly,
        errors.TierUnavailable,
        errors.UsageError,
    }
)
