"""The allocator against a model of ranges, and the pool as two processes see it."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import kvstrata
from kvstrata.errors import Incompatible, TierUnavailable, UsageError
from kvstrata.memory import mapping as mapping_module
from kvstrata.memory.allocator import SlotAllocator
from kvstrata.memory.machine import available_bytes, total_bytes
from kvstrata.memory.pool import Pool, PoolMapping

PAGE = 4096


class TestSlotAllocator:
    def test_lowest_first_then_full(self) -> None:
        allocator = SlotAllocator(3 * PAGE)
        assert [allocator.allocate(PAGE) for _ in range(4)] == [0, PAGE, 2 * PAGE, None]
        assert allocator.allocated_bytes == allocator.capacity_bytes
        assert allocator.allocate(1) is None

    def test_capacity_is_rounded_down_and_sizes_up(self) -> None:
        allocator = SlotAllocator(3 * PAGE - 1)
        assert allocator.capacity_bytes == 2 * PAGE
        offset = allocator.allocate(PAGE + 1)
        assert offset == 0
        assert allocator.allocated_bytes == 2 * PAGE
        assert allocator.allocate(1) is None

    def test_best_fit(self) -> None:
        allocator = SlotAllocator(100 * PAGE)
        holes = [allocator.allocate(pages * PAGE) for pages in (5, 1, 3, 1, 4, 1)]
        for hole in holes[::2]:
            assert hole is not None
            allocator.free(hole)
        assert allocator.allocate(3 * PAGE) == holes[2]
        assert allocator.allocate(4 * PAGE) == holes[4]
        assert allocator.allocate(4 * PAGE) == holes[0]
        allocator.check_integrity()

    @pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
    def test_neighbours_join(self, order: tuple[int, ...]) -> None:
        allocator = SlotAllocator(3 * PAGE)
        for _ in range(3):
            allocator.allocate(PAGE)
        for i in order:
            allocator.free(i * PAGE)
            allocator.check_integrity()
        assert len(allocator) == 0
        assert allocator.allocate(3 * PAGE) == 0

    def test_last_freed_is_reused_first(self) -> None:
        allocator = SlotAllocator(8 * PAGE)
        for _ in range(8):
            allocator.allocate(PAGE)
        for i in (1, 5, 3):
            allocator.free(i * PAGE)
        assert allocator.allocate(PAGE) == 3 * PAGE

    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_size_must_be_positive(self, nbytes: int) -> None:
        with pytest.raises(UsageError):
            SlotAllocator(PAGE).allocate(nbytes)

    @pytest.mark.parametrize(("capacity", "alignment"), [(PAGE - 1, PAGE), (0, 1), (PAGE, 0)])
    def test_capacity_must_hold_a_slot(self, capacity: int, alignment: int) -> None:
        with pytest.raises(UsageError):
            SlotAllocator(capacity, alignment)

    def test_free_of_an_unknown_offset_changes_nothing(self) -> None:
        allocator = SlotAllocator(4 * PAGE)
        allocator.allocate(2 * PAGE)
        for offset in (PAGE, 2 * PAGE, -PAGE, 99 * PAGE):
            with pytest.raises(UsageError):
                allocator.free(offset)
        allocator.free(0)
        with pytest.raises(UsageError):
            allocator.free(0)
        allocator.check_integrity()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda a: a._live.__setitem__(0, 2 * PAGE),
            lambda a: a._live.pop(0),
            lambda a: a._bins.clear(),
            lambda a: a._free_at_end.pop(8 * PAGE),
            lambda a: a._sizes.append(PAGE),
            lambda a: setattr(a, "_allocated_bytes", 0),
            lambda a: setattr(a, "capacity_bytes", 9 * PAGE),
        ],
    )
    def test_integrity_sees_damage(self, damage: object) -> None:
        allocator = SlotAllocator(8 * PAGE)
        for _ in range(4):
            allocator.allocate(PAGE)
        allocator.check_integrity()
        assert callable(damage)
        damage(allocator)
        with pytest.raises(AssertionError):
            allocator.check_integrity()

    def test_integrity_sees_free_neighbours(self) -> None:
        allocator = SlotAllocator(4 * PAGE)
        allocator._remove_free(0, 4 * PAGE)
        allocator._add_free(0, PAGE)
        allocator._add_free(PAGE, 3 * PAGE)
        with pytest.raises(AssertionError, match="not joined"):
            allocator.check_integrity()


class AllocatorMachine(RuleBasedStateMachine):
    """Every page of a small pool is coloured by its owner."""

    PAGES = 24

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator(self.PAGES * PAGE)
        self.owner: list[int | None] = [None] * self.PAGES

    def holes(self) -> list[int]:
        """The lengths of the free runs, in pages."""
        text = "".join("." if owner is None else "x" for owner in self.owner)
        return [len(run) for run in re.findall(r"\.+", text)]

    @rule(pages=st.integers(1, 8), less=st.integers(0, PAGE - 1))
    def allocate(self, pages: int, less: int) -> None:
        fitting = [hole for hole in self.holes() if hole >= pages]
        offset = self.allocator.allocate(pages * PAGE - less)
        if offset is None:
            assert not fitting
            return
        first, after = offset // PAGE, offset // PAGE + pages
        assert offset % PAGE == 0
        assert self.owner[first:after] == [None] * pages
        size = pages
        while after < self.PAGES and self.owner[after] is None:
            after, size = after + 1, size + 1
        while first > 0 and self.owner[first - 1] is None:
            first, size = first - 1, size + 1
        assert size == min(fitting), "not the best fit"
        self.owner[offset // PAGE : offset // PAGE + pages] = [offset] * pages

    @precondition(lambda self: any(owner is not None for owner in self.owner))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        live = sorted({owner for owner in self.owner if owner is not None})
        offset = data.draw(st.sampled_from(live))
        self.allocator.free(offset)
        self.owner = [None if owner == offset else owner for owner in self.owner]

    @invariant()
    def agrees(self) -> None:
        used = sum(owner is not None for owner in self.owner) * PAGE
        assert self.allocator.allocated_bytes == used
        self.allocator.check_integrity()


TestAllocatorHistory = AllocatorMachine.TestCase
TestAllocatorHistory.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@contextmanager
def new_pool(capacity_bytes: int) -> Iterator[Pool]:
    pool = Pool.create(capacity_bytes)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    with new_pool(16 * PAGE) as pool:
        yield pool


class TestPool:
    def test_size(self, pool: Pool) -> None:
        assert pool.capacity_bytes == 16 * PAGE
        assert os.fstat(pool.fd).st_size == 16 * PAGE
        with new_pool(3 * PAGE - 1) as odd:
            assert odd.capacity_bytes == 2 * PAGE

    def test_cannot_change_its_size(self, pool: Pool) -> None:
        for size in (PAGE, 32 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(pool.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(pool.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def test_is_not_inherited(self, pool: Pool) -> None:
        assert not os.get_inheritable(pool.fd)

    def test_view_and_array_are_the_same_bytes(self, pool: Pool) -> None:
        view, array = pool.view(PAGE, PAGE), pool.array(PAGE, 2 * PAGE)
        assert (view.nbytes, view.format, view.readonly) == (PAGE, "B", False)
        assert (array.dtype.name, array.shape) == ("uint8", (2 * PAGE,))
        assert array.ctypes.data == pool.address + PAGE
        view[:4] = b"abcd"
        assert array[:4].tobytes() == b"abcd"
        assert os.pread(pool.fd, 4, PAGE) == b"abcd"

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 16 * PAGE + 1)])
    def test_out_of_bounds(self, pool: Pool, offset: int, nbytes: int) -> None:
        for window in (pool.view, pool.array):
            with pytest.raises(UsageError):
                window(offset, nbytes)

    def test_edges(self, pool: Pool) -> None:
        assert pool.view(0, 16 * PAGE).nbytes == 16 * PAGE
        assert pool.view(16 * PAGE, 0).nbytes == 0
        with pytest.raises(UsageError):
            pool.view(16 * PAGE, 1)

    def test_close_is_repeatable_and_final(self, pool: Pool) -> None:
        fd = pool.fd
        pool.close()
        pool.close()
        assert pool.closed
        for use in (lambda: pool.view(0, 1), lambda: pool.fd, lambda: pool.address, pool.populate):
            with pytest.raises(UsageError):
                use()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    @pytest.mark.parametrize("window", ["view", "array"])
    def test_what_is_still_looked_at_stays_mapped(self, window: str) -> None:
        pool = Pool.create(16 * PAGE, name="kvstrata-view-test")
        held = getattr(pool, window)(PAGE, 4)
        held[0] = 7
        pool.close()
        assert held[0] == 7
        assert mapped("kvstrata-view-test") == 1
        del held
        gc.collect()
        assert mapped("kvstrata-view-test") == 0

    @pytest.mark.parametrize("capacity", [0, -1, PAGE - 1])
    def test_too_small(self, capacity: int) -> None:
        with pytest.raises(UsageError):
            Pool.create(capacity)

    @pytest.mark.parametrize("capacity", [1 << 60, 1 << 70])
    def test_too_large_leaks_nothing(self, capacity: int) -> None:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(TierUnavailable):
            Pool.create(capacity)
        assert os.listdir("/proc/self/fd") == before


class TestAttach:
    def test_sees_and_writes_the_same_bytes(self, pool: Pool) -> None:
        mapping = PoolMapping.attach(pool.fd, pool.capacity_bytes)
        pool.view(0, 2)[:] = b"ab"
        assert bytes(mapping.view(0, 2)) == b"ab"
        mapping.array(5 * PAGE, 3)[:] = 9
        assert pool.array(5 * PAGE, 3).tolist() == [9, 9, 9]
        mapping.close()
        mapping.close()

    def test_outlives_the_descriptor_and_the_pool(self) -> None:
        pool = Pool.create(4 * PAGE)
        pool.view(0, 2)[:] = b"ab"
        fd = os.dup(pool.fd)
        mapping = PoolMapping.attach(fd, 4 * PAGE)
        os.close(fd)
        pool.close()
        assert bytes(mapping.view(0, 2)) == b"ab"
        mapping.close()

    def test_from_another_process(self, pool: Pool) -> None:
        ours, theirs = socket.socketpair()
        script = (
            "import socket, sys\n"
            "from kvstrata.memory.pool import PoolMapping\n"
            "s = socket.socket(fileno=int(sys.argv[1]))\n"
            "_, (fd,), _, _ = socket.recv_fds(s, 1, 1)\n"
            "m = PoolMapping.attach(fd, int(sys.argv[2]))\n"
            "m.view(4096, 5)[:] = bytes(m.view(0, 5))\n"
        )
        pool.view(0, 5)[:] = b"hello"
        with ours, theirs:
            socket.send_fds(ours, [b"x"], [pool.fd])
            source = str(Path(kvstrata.__file__).parents[1])
            subprocess.run(
                [sys.executable, "-c", script, str(theirs.fileno()), str(pool.capacity_bytes)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": source},
                check=True,
                timeout=60,
            )
        assert bytes(pool.view(4096, 5)) == b"hello"

    def test_smaller_than_announced(self, pool: Pool) -> None:
        with pytest.raises(Incompatible, match="65536 bytes, 65537"):
            PoolMapping.attach(pool.fd, pool.capacity_bytes + 1)

    def test_a_part_will_do(self, pool: Pool) -> None:
        mapping = PoolMapping.attach(pool.fd, PAGE)
        with pytest.raises(UsageError):
            mapping.view(PAGE, 1)
        mapping.close()

    def test_capacity_must_be_positive(self, pool: Pool) -> None:
        with pytest.raises(UsageError):
            PoolMapping.attach(pool.fd, 0)

    def test_an_unsealed_memory_is_refused(self) -> None:
        fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, PAGE)
            with pytest.raises(Incompatible, match="shrink"):
                PoolMapping.attach(fd, PAGE)
        finally:
            os.close(fd)

    def test_what_is_no_memory_is_refused(self) -> None:
        with socket.socket(socket.AF_UNIX) as other, pytest.raises(Incompatible):
            PoolMapping.attach(other.fileno(), PAGE)


class TestPopulate:
    CAPACITY = 5 << 20  # two whole pieces and a half

    @pytest.mark.parametrize("in_background", [True, False])
    def test_faults_everything_in(self, in_background: bool) -> None:
        with new_pool(self.CAPACITY) as pool:
            pool.view(3 << 20, 3)[:] = b"abc"
            pool.populate(in_background)
            if pool._populating is not None:
                pool._populating.join()
            if pool.populated_bytes == 0:
                pytest.skip("this kernel has no MADV_POPULATE_WRITE")
            assert pool.populated_bytes == self.CAPACITY
            assert os.fstat(pool.fd).st_blocks * 512 == self.CAPACITY
            assert bytes(pool.view(3 << 20, 3)) == b"abc"
            pool.populate(in_background)  # nothing left to do
            assert pool.populated_bytes == self.CAPACITY

    def test_gives_up_silently(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mapping_module, "_MADV_POPULATE_WRITE", 9999)
        with new_pool(self.CAPACITY) as pool:
            pool.populate(in_background=False)
            assert pool.populated_bytes == 0

    def test_without_huge_pages_small_ones_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mapping_module, "_MADV_COLLAPSE", 9999)
        with new_pool(self.CAPACITY) as pool:
            pool.populate(in_background=False)
            assert pool.populated_bytes == self.CAPACITY

    def test_huge_pages_keep_what_was_written(self) -> None:
        with new_pool(8 << 20) as pool:
            assert pool.address % mapping_module.HUGE_BYTES == 0
            other = PoolMapping.attach(pool.fd, pool.capacity_bytes)
            assert other.address % mapping_module.HUGE_BYTES == 0
            data = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8)
            other.array(0, 8 << 20)[:] = data
            pool.populate(in_background=False)
            if not mapping_module.collapse(pool.address):
                pytest.skip("this kernel makes no huge pages of shared memory")
            huge = re.findall(r"ShmemPmdMapped: +([0-9]+) kB", Path("/proc/self/smaps").read_text())
            assert any(int(kib) >= 2048 for kib in huge)
            assert np.array_equal(pool.array(0, 8 << 20), data)
            assert np.array_equal(other.array(0, 8 << 20), data)
            other.close()

    def test_close_ends_it(self) -> None:
        pool = Pool.create(8 << 30)
        pool.populate()
        thread = pool._populating
        assert thread is not None
        pool.close()
        assert not thread.is_alive()
        assert pool.populated_bytes < 8 << 30


def mapped(name: str) -> int:
    """How many maps of a memfd of that name this process has."""
    return Path("/proc/self/maps").read_text().count(f"memfd:{name} ")


class TestHowMuchThereIs:
    @staticmethod
    def machine(root: Path, cgroup: str, **groups: dict[str, str]) -> Path:
        """A false machine: 1000 KiB, 600 of them available."""
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable:  600 kB\n")
        (root / "proc/self/cgroup").write_text(cgroup)
        for group, files in groups.items():
            folder = root / "sys/fs/cgroup" / group.replace("_", "/")
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text)
        return root

    def test_without_cgroups(self, tmp_path: Path) -> None:
        root = self.machine(tmp_path, "")
        assert (available_bytes(root), total_bytes(root)) == (600 * 1024, 1000 * 1024)
        (root / "proc/self/cgroup").unlink()
        assert available_bytes(root) == 600 * 1024

    def test_version_2_takes_the_tightest_ancestor(self, tmp_path: Path) -> None:
        root = self.machine(
            tmp_path,
            "0::/a/b\n",
            a={"memory.max": "300000\n", "memory.current": "280000\n"},
            a_b={"memory.max": "200000\n", "memory.current": "50000\n"},
        )
        assert (available_bytes(root), total_bytes(root)) == (20000, 200000)

    def test_file_cache_is_available(self, tmp_path: Path) -> None:
        stat = "anon 100\ninactive_file 70000\nactive_file 9\n"
        files = {"memory.max": "200000", "memory.current": "190000", "memory.stat": stat}
        root = self.machine(tmp_path, "0::/a\n", a=files)
        assert available_bytes(root) == 80000

    def test_unlimited_and_over_the_limit(self, tmp_path: Path) -> None:
        root = self.machine(
            tmp_path,
            "0::/a\n",
            a={"memory.max": "max\n", "memory.current": "5\n"},
        )
        assert total_bytes(root) == 1000 * 1024
        (root / "sys/fs/cgroup/a/memory.max").write_text("3\n")
        assert available_bytes(root) == 0

    def test_version_1_seen_from_inside_a_container(self, tmp_path: Path) -> None:
        root = self.machine(
            tmp_path,
            "5:cpu:/x\n4:memory:/of/the/host\n0::/\n",
            memory={
                "memory.limit_in_bytes": "400000\n",
                "memory.usage_in_bytes": "150000\n",
                "memory.stat": "total_inactive_file 50000\n",
            },
        )
        assert (available_bytes(root), total_bytes(root)) == (300000, 400000)

    def test_meminfo_without_the_field(self, tmp_path: Path) -> None:
        root = self.machine(tmp_path, "")
        (root / "proc/meminfo").write_text("MemTotal: 1000 kB\n")
        with pytest.raises(TierUnavailable, match="MemAvailable"):
            available_bytes(root)

    def test_this_machine(self) -> None:
        assert 0 < available_bytes() <= total_bytes()


@given(st.lists(st.integers(1, 40_000), max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_everything_freed_is_one_range_again(sizes: list[int], draw: random.Random) -> None:
    allocator = SlotAllocator(1 << 20)
    offsets = [offset for n in sizes if (offset := allocator.allocate(n)) is not None]
    draw.shuffle(offsets)
    for offset in offsets:
        allocator.free(offset)
    allocator.check_integrity()
    assert allocator.allocate(allocator.capacity_bytes) == 0
