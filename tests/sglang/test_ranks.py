"""Two ranks of tensor parallelism: each keeps its part, and both go on from what both have."""

from __future__ import annotations

import os
from pathlib import Path

from tests.engine.plain import Texts
from tests.sglang.place import Place, await_stored, disk, eventually, pages

from kvstrata.testing import models
from kvstrata.testing.workplace import wait_ready
from kvstrata.tiers.disk.scan import parse_name


def files(folder: Path, rank: int) -> set[Path]:
    """Those of the objects of a rank."""
    found = {path: parse_name(path.name) for path in folder.rglob("*.kvo")}
    return {
        path
        for path, name in found.items()
        if name is not None and int.from_bytes(name.object_id[-2:], "little") == rank
    }


def test_both_ranks_hit_and_both_take_the_shorter_prefix(
    tiny_llama: Path, tmp_path: Path, texts: Texts
) -> None:
    (prompt,) = texts.of(1000)
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    with Place(tiny_llama, disk(tmp_path)) as place:
        server = place.server({"tp-size": 2}, {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(cores)})
        server.wait()
        with await_stored(place.node, 2 * 256):
            server.ask(prompt[:300])
        beginnings = files(tmp_path, 1)
        assert len(beginnings) == len(files(tmp_path, 0)) == 2
        server.flush()
        with await_stored(place.node, 2 * (pages(1008) - 256)):
            assert server.ask(prompt).loaded == 256
        server.flush()
        whole = server.ask(prompt)
        assert whole.loaded == pages(1000)

        place.stop_node()
        for path in files(tmp_path, 1) - beginnings:
            path.unlink()
        place.start_node()
        wait_ready(place.node)
        place.await_hits(server)
        server.flush()
        short = server.ask(prompt)
        assert short.loaded == short.cached == 256, place.node.status()["requests"][-2:]
        assert short.tokens == whole.tokens
        eventually(lambda: len(files(tmp_path, 1)) == len(files(tmp_path, 0)), "it is stored again")
        server.flush()
        again = server.ask(prompt)
        assert again.loaded == pages(1000)
        assert again[:2] == whole[:2]

        # New weights are called by one name on both, or neither would find what it has stored.
        server.post("/update_weights_from_disk", {"model_path": str(models.tiny_llama(seed=1))})
        with await_stored(place.node, 2 * pages(1008)):
            other = server.ask(prompt)
        assert other.cached == 0
        server.flush()
        again = server.ask(prompt)
        assert again.loaded == pages(1000)
        assert again[:2] == other[:2]
        assert "Traceback" not in server.said
        place.check()
