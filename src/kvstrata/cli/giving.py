"""Commands to a fleet, given, and each node's answer, printed as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import typer

from kvstrata.cli.plain import echo
from kvstrata.cli.registered import registry_of
from kvstrata.units import approximate_size

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.fleet.commands import Answers
    from kvstrata.fleet.registry import Registry
    from kvstrata.wire import protocol as p


def give(
    config: Config,
    requests: Callable[[Registry], Sequence[p.Request]],
    timeout_s: float,
    only: Sequence[str] | None,
) -> None:
    """Give commands to all nodes at once; exit status 1 if one of them is not done by all.

    Args:
        config: says where the registry is.
        requests: what to give, one after the other, whatever became of the one before.
        timeout_s: for each.
        only: to these nodes; None: to all.
    """
    from kvstrata.fleet import commands

    done = True
    with registry_of(config) as registry:
        for request in requests(registry):
            posted = commands.post(registry, request, timeout_s, only or ())
            answers = commands.wait(registry, posted, timeout_s, partial(_say, request))
            _say_missing(request, answers)
            done = done and answers.done
    if not done:
        raise typer.Exit(1)


def in_turn(
    config: Config, request: p.Request, timeout_s: float, only: Sequence[str] | None
) -> None:
    """Give one command to one node after the other, as long as it goes well."""
    from kvstrata.fleet import commands

    with registry_of(config) as registry:
        tell = partial(_say, request)
        answers = commands.one_by_one(registry, request, timeout_s, tell, only or ())
        _say_missing(request, answers)
    if not answers.done:
        raise typer.Exit(1)


def _say(request: p.Request, name: str, reply: p.Reply) -> None:
    echo(f"{name}: {_words(request, reply)}")


def _words(request: p.Request, reply: p.Reply) -> str:
    """One node's answer."""
    from kvstrata.wire import operating as o
    from kvstrata.wire import protocol as p

    match request, reply:
        case _, p.Failed(kind=kind, message=message):
            return f"{kind}: {message}"
        case _, p.Pinned(num_chunks=num_chunks, num_kept=num_kept, tiers=tiers, notes=notes):
            kept = ", ".join(f"{tier} {count}" for tier, count in tiers.items() if count)
            others = "".join(f"; {tier}: {note}" for tier, note in notes.items())
            return f"{num_kept} of {num_chunks} chunks are kept: {kept or 'none here yet'}{others}"
        case p.Unpin(), p.Done(count=count):
            return f"{count} chunks are kept no more" if count else "there is no such pin"
        case p.Quota(owner=owner, tier=tier), p.Done(count=nbytes):
            return f"owner {owner.hex()} has {approximate_size(nbytes)} in {tier}"
        case _, o.Reloaded(changed=changed, engines=engines):
            later = f"; for engines that start from now on: {', '.join(engines)}" if engines else ""
            return f"changed: {', '.join(changed) or 'nothing'}{later}"
        case _, p.Done(count=count):
            return f"done, {count} objects"
        case _, o.JobPage(jobs=[job, *_]):
            failed = f", {job.failed} failed" if job.failed else ""
            return f"done, {job.done} of {job.total}{failed}"
    return "done"


def _say_missing(request: p.Request, answers: Answers) -> None:
    """Print who has not answered, and what that means."""
    from kvstrata.fleet.commands import LASTING

    lasts = isinstance(request, LASTING)
    later = "it does it when it comes back, before it takes part" if lasts else "it has not done it"
    for name in answers.gone:
        echo(f"{name}: gone; {later}")
    for name in answers.silent:
        echo(f"{name}: no answer in time")
    if not answers.answered and not answers.gone and not answers.silent:
        echo("no node is registered" + ("; one that comes does it first" if lasts else ""))
