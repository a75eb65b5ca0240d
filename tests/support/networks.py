"""A bad network between two nodes: namespaces of Linux, and a link that this process carries.

Each end is a network namespace with a TUN device; the packets between them go through a thread,
which delays, loses, holds back or drops them. What the nodes use is the kernel's own TCP. Not every
kernel has netem, and that one cannot be asked how much it carried.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
MTU = 1500
QUEUE_S = 0.2
"""How long a packet waits for its turn at most, where there is a rate; then it is dropped."""

_numbers = itertools.count()


def missing() -> str:
    """Why there can be no such network here; empty where there can."""
    if shutil.which("ip") is None:
        return "there is no ip command (Debian: iproute2)"
    try:
        os.close(_tun(f"kvt{os.getpid() % 10**6:06}x"))
    except OSError as error:
        return f"no TUN device can be made: {error}"
    made = subprocess.run(
        ["ip", "netns", "add", f"kvt-{os.getpid()}-x"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "del", f"kvt-{os.getpid()}-x")
    return ""


@dataclass
class Link:
    """What the network is like, in either direction; may be changed at any time.

    Args:
        delay_s: of each packet, one way.
        loss: the share of packets that never arrive.
        rate: bytes a second; 0: as fast as it goes.
        cut: nothing arrives any more.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    cut: bool = False


class Network:
    """Two namespaces, ``10.77.0.1`` and ``10.77.0.2``, and the link between them."""

    HOSTS = ("10.77.0.1", "10.77.0.2")

    def __init__(self, seed: int = 0) -> None:
        self.link = Link()
        self.num_dropped = 0
        self.num_carried = 0
        number = next(_numbers)
        self.names = [f"kvt-{os.getpid()}-{number}-{end}" for end in "ab"]
        self._draw = random.Random(seed)
        self.devices: list[str] = []
        self._fds: list[int] = []
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        try:
            for end, (name, host) in enumerate(zip(self.names, self.HOSTS, strict=True)):
                device = f"kvt{os.getpid() % 10**5:05}{number}{'ab'[end]}"
                self.devices.append(device)
                self._fds.append(_tun(device))
                os.set_blocking(self._fds[-1], False)
                _ip("netns", "add", name)
                _ip("link", "set", device, "netns", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "address", "add", f"{host}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "mtu", str(MTU), "up")
        except BaseException:
            self.close()
            raise
        self._thread.start()

    def inside(self, end: int) -> list[str]:
        """What a command begins with that is to run at one end."""
        return ["ip", "netns", "exec", self.names[end]]

    def close(self) -> None:
        """Take it all down."""
        if self._thread.ident is not None:
            os.write(self._wake_write, b"x")
            self._thread.join()
        for fd in (*self._fds, self._wake_read, self._wake_write):
            os.close(fd)
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def _carry(self) -> None:
        on_the_way: list[tuple[float, int, int, bytes]] = []
        free_at, order = [0.0, 0.0], itertools.count()
        while True:
            wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
            readable, _, _ = select.select([*self._fds, self._wake_read], [], [], wait_s)
            if self._wake_read in readable:
                return
            now = time.monotonic()
            for fd in readable:
                end = self._fds.index(fd)
                for packet in _packets(fd):
                    due = self._due(len(packet), now, end, free_at)
                    if due is None:
                        self.num_dropped += 1
                    else:
                        heapq.heappush(on_the_way, (due, next(order), 1 - end, packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(on_the_way)
                if self.link.cut:
                    self.num_dropped += 1
                    continue
                self.num_carried += 1
                with contextlib.suppress(OSError):
                    os.write(self._fds[end], packet)

    def _due(self, nbytes: int, now: float, end: int, free_at: list[float]) -> float | None:
        """When a packet arrives; None: never."""
        link = self.link
        if link.cut or self._draw.random() < link.loss:
            return None
        if not link.rate:
            return now + link.delay_s
        begin = max(now, free_at[end])
        if begin - now > QUEUE_S:
            return None
        free_at[end] = begin + nbytes / link.rate
        return free_at[end] + link.delay_s


def _packets(fd: int) -> list[bytes]:
    packets: list[bytes] = []
    with contextlib.suppress(OSError):  # for now there are no more; or the device is down yet
        while len(packets) < 256:
            packets.append(os.read(fd, 1 << 16))
    return packets


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
