"""A workplace whose node runs as a service, and may be killed and started again."""

from __future__ import annotations

from kvstrata.testing.engine import last_words
from kvstrata.testing.workplace import Workplace
from kvstrata.wire.client import NodeClient

END_S = 60.0


class Serviced(Workplace):
    """Made with ``service``; `checked_node.CODE` is one that looks at its own laws."""

    _node: NodeClient | None = None

    @property
    def node(self) -> NodeClient:
        """The test's own client of the node."""
        if self._node is None or not self._node.alive:
            self._node = self.client()
        return self._node

    def kill_node(self) -> None:
        """End it as a crash does; until then it was in order."""
        assert self._service is not None
        assert self._service.poll() is None, last_words(self.folder / "node.log")
        self._service.kill()
        self._service.wait()
        self._node = None

    def start_node(self) -> None:
        """Another one in its place."""
        self._serve()

    def stop_node(self) -> None:
        """End it as its operator does, and see that it ends well."""
        assert self._service is not None
        self._service.terminate()
        assert self._service.wait(END_S) == 0, last_words(self.folder / "node.log", 30)
        self._node = None
