"""What of a configuration may change while the node runs, and how each of it does.

The table below is the whole of it. Any other option is read once, when the node starts: a change
of it is refused by its name, and then nothing is changed at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from kvstrata.config import OPTIONS, Config, differing, load_config
from kvstrata.errors import ConfigError
from kvstrata.node.operating.places import Places
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.shared import SharedBacking
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.node.slots.sampling import Sampler

logger = logging.getLogger(__name__)

OF_ENGINES = ("deadlines.match", "deadlines.request", "deadlines.attach", "tenant", "chunk_tokens")
"""Options that only engines read, when they start: to change them changes nothing here."""


class Reloader:
    """Holds the node to another configuration.

    Args:
        config: the one that it was started with.
        places: the tiers.
        leases: of host memory.
        reservations: of host memory.
        sampler: of what is verified.
        plan: turns planning on and off.
    """

    def __init__(
        self,
        config: Config,
        places: Places,
        leases: LeaseTable,
        reservations: ReservationTable,
        sampler: Sampler,
        plan: Callable[[bool], None],
    ) -> None:
        self.config = config
        self._places = places
        self._leases = leases
        self._reservations = reservations
        self._sampler = sampler
        self._plan = plan
        self._changing: Mapping[str, Callable[[Config], None]] = {
            "log": self._log,
            "planner": lambda new: self._plan(new.planner == "on"),
            "host.verify_every": self._verify,
            "leases.per_client": self._caps,
            "leases.total": self._caps,
            "deadlines.load": self._deadline,
            **{f"{name}.scrub_rate": self._scrub for name in places.names},
            **{f"{name}.write_queue": self._queues for name in places.names},
            **{f"{name}.lookup_timeout": self._timeouts for name in places.names},
        }

    @property
    def options(self) -> list[str]:
        """What may change while the node runs."""
        return [path for path in OPTIONS if path in self._changing]

    def amended(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration as a file has it, but for these options, by their paths.

        Raises:
            ConfigError: there is no such option.
        """
        given = self.config.to_dict()
        for path, value in options.items():
            if path not in OPTIONS:
                raise ConfigError(path, "there is no such option")
            part, _, name = path.rpartition(".")
            (given.setdefault(part, {}) if part else given)[name] = value
        return given

    def check(self, given: dict[str, Any]) -> tuple[Config, list[str], list[str]]:
        """A whole new configuration, what of it changes here, and what engines alone read.

        May block, and touches nothing.

        Raises:
            ConfigError: it is none, or changes what cannot change while the node runs.
        """
        new = load_config(environ={}, overrides=given)
        changed = differing(self.config, new)
        for path in changed:
            if path not in self._changing and path not in OF_ENGINES:
                raise ConfigError(
                    path,
                    "cannot change while the node runs: restart it, or leave this as it was; "
                    f"nothing was changed. What can: {', '.join(self.options)}",
                )
        here = [path for path in changed if path in self._changing]
        return new, here, [path for path in changed if path in OF_ENGINES]

    def apply(self, new: Config, changed: list[str]) -> None:
        """Do what `check` found to be possible."""
        for change in dict.fromkeys(self._changing[path] for path in changed):
            change(new)
        self.config = new
        logger.info("reloaded: %s", ", ".join(changed) or "nothing has changed")

    def _log(self, new: Config) -> None:
        logging.getLogger().setLevel(new.log.upper())

    def _verify(self, new: Config) -> None:
        self._sampler.every = new.host.verify_every

    def _caps(self, new: Config) -> None:
        # What is leased or reserved beyond a smaller cap stays until it ends.
        capacity = self._places.host.pool.capacity_bytes
        per_client = int(new.leases.per_client * capacity)
        self._leases.per_client_bytes = self._reservations.per_client_bytes = per_client
        self._leases.total_bytes = int(new.leases.total * capacity)

    def _deadline(self, new: Config) -> None:
        for backing in self._places.backings:
            backing.wait_for(new.deadlines.load)

    def _scrub(self, new: Config) -> None:
        for backing in self._places.backings:
            if isinstance(backing, OwnedBacking):
                part: Any = new.tier(backing.name)
                backing.scrub_bytes_per_s = part.scrub_rate

    def _queues(self, new: Config) -> None:
        for backing in self._places.backings:
            if (part := new.tier(backing.name)) is not None:
                backing.queue_bytes = part.write_queue

    def _timeouts(self, new: Config) -> None:
        for backing in self._places.backings:
            if isinstance(backing, SharedBacking):
                part: Any = new.tier(backing.name)
                backing.lookup_timeout_s = part.lookup_timeout
