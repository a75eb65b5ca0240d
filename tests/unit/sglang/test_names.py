"""Pages are called by the namespace of the weights of the moment, or not at all."""

from __future__ import annotations

import pytest

from kvstrata.connectors.sglang.names import Names
from kvstrata.connectors.sglang.renewals import Generation
from kvstrata.errors import ConfigError, UsageError
from kvstrata.keys import Namespace
from kvstrata.pagekeys import PageKeys

SECRET, OTHER = bytes(range(32)), bytes(32)
HASHES = [bytes([n] * 32).hex() for n in range(5)]


class Finder:
    """Finds namespaces, and counts how often it is asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Namespace | Exception | None] = {}
        self.num_asked = 0

    def __call__(self, generation: str) -> Namespace | None:
        self.num_asked += 1
        answer = self.answers.get(generation)
        if isinstance(answer, Exception):
            raise answer
        return answer


def space(model: str) -> Namespace:
    return Namespace(model, "layout", 64)


def test_what_is_not_known_yet_is_asked_for_again() -> None:
    finder = Finder()
    names = Names(finder, Generation())
    assert names.namespace("") is None
    assert names.digest("") == b""
    finder.answers[""] = space("m")
    assert names.namespace("") == space("m")
    assert names.digest("") == space("m").digest()
    asked = finder.num_asked
    for _ in range(10):
        names.digest("")
    assert finder.num_asked == asked, "once it is known nobody asks"


@pytest.mark.parametrize("error", [ConfigError("model", "no weights"), OSError("gone")])
def test_what_cannot_be_known_is_not_asked_for_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    finder = Finder()
    finder.answers[""] = error
    names = Names(finder, Generation())
    for _ in range(3):
        assert names.namespace("") is None
        assert names.digest("") == b""
    assert finder.num_asked == 1
    assert names.problem
    assert len(caplog.records) == 1


def test_other_weights_have_other_keys() -> None:
    finder = Finder()
    finder.answers = {"": space("m"), "a": space("ma")}
    names = Names(finder, Generation())
    keys = {
        (secret, name): tuple(names.keys(secret, names.digest(name), HASHES))
        for secret in (SECRET, OTHER) for name in ("", "a")
    }  # fmt: skip
    assert len(set(keys.values())) == 4
    for (secret, name), found in keys.items():
        digest = finder.answers[name].digest()  # type: ignore[union-attr]
        expected = PageKeys(secret, digest).of([bytes.fromhex(page) for page in HASHES])
        assert list(found) == expected


def test_new_pools_are_a_new_namespace() -> None:
    finder = Finder()
    finder.answers[""] = space("m")
    names = Names(finder, Generation())
    before = names.keys(SECRET, names.digest(""), HASHES)
    finder.answers[""] = space("with another pool")
    assert names.keys(SECRET, names.digest(""), HASHES) == before
    names.forget()
    assert names.keys(SECRET, names.digest(""), HASHES) != before


def test_many_namespaces_leave_nothing_behind() -> None:
    finder = Finder()
    names = Names(finder, Generation())
    for number in range(40):
        finder.answers[str(number)] = space(str(number))
        names.keys(SECRET, names.digest(str(number)), HASHES)
    assert len(names._known) == 1
    assert len(names._keys) <= 9


def test_what_is_no_hash_is_refused() -> None:
    finder = Finder()
    finder.answers[""] = space("m")
    names = Names(finder, Generation())
    with pytest.raises(UsageError, match="page hash"):
        names.keys(SECRET, names.digest(""), ["00" * 31])
    with pytest.raises(ValueError, match="hex"):
        names.keys(SECRET, names.digest(""), ["page"])
