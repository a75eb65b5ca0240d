"""The demo's results, and whether it notices that others use the machine; the engine's part not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstrata.cli.demo_fleet import fleet_table
from kvstrata.cli.demo_results import Asked, Reused, plot, reuse_table, table
from kvstrata.testing.others import OtherWork


def asked(disk_token: int = 2) -> Asked:
    times = {
        "cold": [2000.0],
        "own": [80.0, 81.0, 79.0],
        "host": [335.0, 100.0, 90.0],  # the first time something else ran
        "disk": [125.0, 110.0, 130.0],
    }
    tokens = {way: [[1, 2]] * len(found) for way, found in times.items()}
    tokens["disk"] = [[1, 2], [1, disk_token], [1, 2]]
    return Asked(1, 2069, times, tokens, "an answer")


def test_one_noisy_answer_does_not_count() -> None:
    assert asked().ms("host") == 100.0
    assert asked().faster("host") == 20.0
    assert asked().to_dict()["median_ms"] == {"cold": 2000.0, "own": 80, "host": 100, "disk": 125}


def test_another_token_in_any_answer_is_seen() -> None:
    assert asked().same
    assert not asked(disk_token=3).same


def test_it_draws_and_tabulates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot([asked(), asked()], tmp_path / "demo.png", "a caption")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    found = table([asked()])
    assert [next(iter(column.cells)) for column in found.columns] == [
        *("1", "2,069", "2,000", "80", "100", "125", "20x", "16x", "yes")
    ]


def test_what_was_reused_is_tabulated() -> None:
    one = asked()
    one.reused = {"turn": Reused(2079, 2079, 2048), "other": Reused(2050, 2032, 1920)}
    found = reuse_table([one])
    assert [next(iter(column.cells)) for column in found.columns] == [
        *("1", "2,079", "2,079", "2,048", "2,050", "2,032", "1,920")
    ]
    assert one.to_dict()["reused"]["turn"] == {"common": 2079, "loaded": 2079, "whole": 2048}


def test_a_fleet_is_tabulated() -> None:
    fleet = Asked(2, 3073)
    for way, first_s in (("cold", 4.0), ("fleet", 0.25), ("apart", 4.4)):
        fleet.heard(way, first_s, [1, 2])
    found = fleet_table([fleet])
    assert [next(iter(column.cells)) for column in found.columns] == [
        *("2", "3,073", "4,000", "250", "16x", "4,400", "yes")
    ]
    fleet.heard("apart", 4.4, [1, 3])
    assert "NO" in str(list(fleet_table([fleet]).columns[-1].cells))


class Kernel:
    """A proc of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine(0, 0)

    def machine(self, busy: int, idle: int, stolen: int = 0) -> None:
        """Ticks since its start; a guest's are in the user's too."""
        line = f"cpu  {busy} 0 0 {idle} 0 0 0 {stolen} {busy} 0\ncpu0 1 1 1 1\n"
        (self.folder / "stat").write_text(line)

    def process(self, pid: int, parent: int, ticks: int, of_children: int = 0) -> None:
        """A process with an unpleasant name."""
        before = " ".join("0" * 9)
        words = f"{pid} (a) b) S {parent} {before} {ticks} 0 {of_children} 0 20 0\n"
        (self.folder / str(pid)).mkdir(exist_ok=True)
        (self.folder / str(pid) / "stat").write_text(words)


def test_the_work_of_others_is_what_is_not_ours(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.process(10, 1, 50)  # ours
    kernel.process(11, 10, 50)  # our child, which ends
    kernel.process(20, 1, 50)  # ours: a node, which is nobody's child
    kernel.process(30, 1, 50)  # somebody's
    others = OtherWork(tmp_path)
    with others.counted(10, 20):
        kernel.machine(busy=150, idle=40, stolen=10)
        kernel.process(10, 1, 60, of_children=90)
        (tmp_path / "11" / "stat").unlink()
        kernel.process(12, 10, 10)
        kernel.process(20, 1, 80)
        kernel.process(30, 1, 90)
    # Ours took 10 + 40 + 10 + 30 of the 150; 60 are others', and 10 another guest's.
    assert others.share == pytest.approx(70 / 200)
    with others.counted(10, 20):
        kernel.machine(busy=150, idle=640, stolen=10)
    assert others.share == pytest.approx(70 / 800)


def test_a_kernel_that_counts_nothing_names_nobody(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    others = OtherWork(tmp_path)
    with others.counted(10):
        kernel.machine(0, 0)
    assert others.share == 0.0


def test_this_machine_can_be_asked() -> None:
    others = OtherWork()
    with others.counted(os.getpid()):
        pass
    assert 0.0 <= others.share <= 1.0
