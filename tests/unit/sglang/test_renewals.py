"""After an exchange of weights nothing is stored until SGLang's own caches are empty."""

from __future__ import annotations

import threading

from kvstrata.connectors.sglang.renewals import Generation


def test_weights_have_a_name_of_their_own_each_time() -> None:
    generation, names = Generation(), set[str]()
    assert generation.storable() == generation.name == ""
    for _ in range(20):
        generation.renew()
        assert generation.storable() is None, "SGLang may hold what the old ones have computed"
        generation.flushed()
        name = generation.storable()
        assert name
        assert name == generation.name
        names.add(name)
    assert len(names) == 20


def test_ranks_agree_on_a_name() -> None:
    ranks = [Generation(), Generation()]
    for rank in ranks:
        rank.renew("the same")
        rank.flushed()
    assert [rank.storable() for rank in ranks] == ["the same", "the same"]


def test_a_flush_alone_changes_nothing() -> None:
    generation = Generation()
    generation.flushed()
    assert generation.storable() == ""


def test_an_exchange_during_another_is_waited_for_too() -> None:
    generation = Generation()
    generation.renew("a")
    generation.renew("b")
    assert generation.storable() is None
    generation.flushed()
    assert generation.storable() == "b"


def test_no_thread_ever_sees_new_weights_with_an_old_name() -> None:
    generation, seen, over = Generation(), list[str | None](), threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(generation.storable())

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(2000):
        generation.renew(str(number))
        generation.flushed()
    over.set()
    thread.join()
    numbers = [int(name) for name in seen if name]
    assert numbers == sorted(numbers)
