"""``kvstrata secret``: exchange the deployment's secret, step by step, and lose no hit."""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.cli.config import ConfigFile, Settings, read_config
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.secret import Secrets

NEXT = "copy the file to every machine of the deployment, and restart their nodes one by one"


class Step(str, Enum):
    """Of a rotation, in their order."""

    new = "new"
    use = "use"
    forget = "forget"


def run(
    step: Annotated[
        Step | None, typer.Argument(help="What to do; without it, show what is known.")
    ] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Show which secrets the file holds, by their public checks, or exchange one for another.

    new: add one that is looked up and not yet used to store. use: store by it from now on, and
    look the old one up. forget: drop the one that is not used to store; what was stored by it alone
    is not found any more. After each step copy the file to all machines and restart their nodes,
    which read it when they start; engines need no restart.
    """
    from kvstrata.secret import load_secrets, new_secret, save_secrets

    file = read_config(config_file, settings).secret_file
    if not os.path.exists(file):
        raise ConfigError(
            str(file), "is not there, or in a folder that is not yours; the first node makes it"
        )
    known = load_secrets(file)
    match step, known:
        case Step.new, (one,):
            known = one, new_secret()
        case Step.use, (one, two):
            known = two, one
        case Step.forget, (one, _):
            known = (one,)
        case Step.new, _:
            raise ConfigError(str(file), "holds two secrets already; forget one of them first")
        case ((Step.use | Step.forget), _):
            raise ConfigError(str(file), "holds one secret only; begin with: kvstrata secret new")
    if step is not None:
        save_secrets(file, known)
    typer.echo(f"{file}")
    _show(known)
    if step is not None:
        typer.echo(f"Now {NEXT}.")


def _show(known: Secrets) -> None:
    from kvstrata.secret import secret_check

    used, *others = map(secret_check, known)
    typer.echo(f"{used}  stored by, and looked up")
    for other in others:
        typer.echo(f"{other}  looked up")
