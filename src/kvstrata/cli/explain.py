"""``kvstrata explain``: why tokens of a request, or of a prompt, are not loaded, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured, fail, join_or_exit
from kvstrata.cli.plain import json_text, plain
from kvstrata.cli.prompting import read, token_ids
from kvstrata.errors import DeadlineExceeded, NodeUnavailable, UsageError

if TYPE_CHECKING:
    from kvstrata.observe.reasons import Unloaded
    from kvstrata.wire.client import NodeClient
    from kvstrata.wire.namespaces import Shown

TIMEOUT_S = 10.0


def run(
    request: Annotated[
        str | None, typer.Argument(help="Id of a request that has ended, or a part of it.")
    ] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A prompt's text instead, as for /v1/completions."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="IDS", help="The same by token ids, as in 1,2,3; or @FILE."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The prompt's model, as its engine names it, or a namespace."),
    ] = None,
    salt: Annotated[str, typer.Option(help="The prompt's cache_salt.")] = "",
    across_tenants: Annotated[
        bool,
        typer.Option(help="Say, too, whether another tenant or salt has the same tokens."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say why a request had to compute what it computed, and what to do about it.

    With --prompt-file or --tokens it says what a prompt would find now; nothing is loaded or
    counted for that. A node remembers its last 1,024 requests. Exit status 1 if no node answers.
    """
    if sum(given is not None for given in (request, prompt_file, tokens)) != 1:
        raise UsageError("name a request, or a prompt by --prompt-file or --tokens")
    client = join_or_exit(configured(config_file, settings, node))
    try:
        if request is not None:
            told = _request(client, request, across=across_tenants)
        else:
            chosen = _chosen(client, model)
            ids = _of_text(prompt_file, chosen) if prompt_file else token_ids(tokens or "")
            told = _prompt(client, ids, chosen, salt, across=across_tenants)
    except (NodeUnavailable, DeadlineExceeded) as error:
        fail(error)
    finally:
        client.close()
    typer.echo(json_text(told) if as_json else render(told))


def render(told: dict[str, Any]) -> str:
    """What `run` found out, for people."""
    from kvstrata.observe.sentences import sentences

    lines = [plain(told["about"])]
    for text, advice in sentences(told["reasons"]):
        lines += [plain(f"  {text}"), plain(f"    → {advice}.")]
    return "\n".join(lines)


def _request(client: NodeClient, request: str, *, across: bool) -> dict[str, Any]:
    from kvstrata.observe.records import number
    from kvstrata.wire.explaining import explain_request

    explained = explain_request(client, request, TIMEOUT_S, across=across)
    record = explained.record
    own, loaded = number(record, "local_tokens"), number(record, "loaded_tokens")
    prompt = number(record, "prompt_tokens")
    about = (
        f"request {record.get('request')}: {prompt:,.0f} prompt tokens, of them {own:,.0f} from "
        f"the engine's own cache, {loaded:,.0f} loaded"
    )
    engines = record.get("loaded_from")
    if isinstance(engines, dict) and engines:
        by = ", ".join(f"{number(engines, name):,.0f} by {name}" for name in engines)
        about += f" (computed: {by})"
    if other := [reason for reason in explained.reasons if reason.detail]:
        about += f"; somebody else has the same beginning now ({other[0].detail})"
    return {"about": about, "reasons": record.get("reasons", []), "record": record}


def _prompt(
    client: NodeClient, ids: Sequence[int], namespace: Shown, salt: str, *, across: bool
) -> dict[str, Any]:
    import msgspec

    from kvstrata.wire.explaining import explain_prompt, unloaded

    explained = explain_prompt(client, namespace, ids, TIMEOUT_S, salt=salt, across=across)
    names = ["host", *client.hello.tiers]
    found = [names[tier] for tier in explained.tiers]
    size = namespace.parts.chunk_tokens
    tiers = {name: found.count(name) * size for name in names if name in found}
    where = ", ".join(f"{count:,} in {name}" for name, count in tiers.items())
    reasons: list[Unloaded] = unloaded(explained, len(ids), namespace)
    about = f"{len(ids):,} tokens, of them {len(found) * size:,} there" + (
        f": {where}" if where else ""
    )
    return {"about": about, "tiers": tiers, "reasons": msgspec.to_builtins(reasons)}


def _chosen(client: NodeClient, model: str | None) -> Shown:
    """The namespace of a model, or the only one; of several those without an adapter.

    Raises:
        UsageError: there is none, or more than one.
    """
    import msgspec

    from kvstrata.wire.namespaces import Shown

    known = msgspec.convert(client.status()["namespaces"], list[Shown])
    fits = [one for one in known if model in (None, one.model.get("name"), one.digest)]
    for few in (fits, [one for one in fits if not one.parts.adapter]):
        if len(few) == 1:
            return few[0]
    names = ", ".join(f"{one.model.get('name', '?')} ({one.digest})" for one in fits or known)
    if not known:
        raise UsageError("no engine has asked this node yet, so it knows of no model")
    raise UsageError(f"name one --model, by its name or its namespace: {names}")


def _of_text(file: Path, namespace: Shown) -> list[int]:
    """A text's tokens, by the files of the namespace's model."""
    try:
        from kvstrata.control.tokenizing import Tokenizers
    except ImportError as error:
        raise UsageError(f"--prompt-file needs pip install 'kvstrata[control]': {error}") from error
    name, weights = namespace.model.get("name", ""), namespace.model.get("weights", "")
    return Tokenizers().of(name, weights).text(read(file))
