"""Keys out of a file, a variable and a command: what is wrong is said, and no key ever is."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from kvstrata.errors import ConfigError
from kvstrata.node.coding import key_source
from kvstrata.node.coding.key_source import read_keys

ONE, OTHER = "1f" * 32, "2E" * 32
BOTH = [bytes.fromhex(ONE), bytes.fromhex(OTHER)]


def file_of(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def refused(source: str) -> str:
    """What is said of a source; never any of the keys."""
    with pytest.raises(ConfigError) as caught:
        read_keys(source, "disk.encryption")
    assert caught.value.path == "disk.encryption"
    assert not any(key[:32] in str(caught.value) for key in (ONE, OTHER))
    return caught.value.problem


@pytest.mark.parametrize("text", [f"{ONE}\n{OTHER}\n", f"\n {ONE}\r\n\n{OTHER}"])
def test_the_first_line_is_the_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = file_of(tmp_path, text)
    monkeypatch.setenv("DISK_KEYS", text)
    assert read_keys(f"file:{file}", "disk.encryption") == BOTH
    assert read_keys("env:DISK_KEYS", "disk.encryption") == BOTH
    assert read_keys(f"command:cat '{file}'", "disk.encryption") == BOTH


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_file_that_others_may_use(tmp_path: Path, mode: int) -> None:
    file = file_of(tmp_path, ONE, mode)
    assert f"(mode {mode:04o}); run: chmod 600 '{file}'" in refused(f"file:{file}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(f"file:{tmp_path}/none")
    assert "Is a directory" in refused(f"file:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "yields no key; make one with: openssl rand -hex 32"),
        (" \n", "yields no key"),
        (ONE[1:], "line 1 is no key, which is 64 hex digits"),
        (ONE + "0", "line 1 is no key"),
        (f"{ONE}\n{OTHER[:-1]}g", "line 2 is no key"),
        (f"{ONE},{OTHER}", "line 1 is no key"),
        ("\0" * 64, "line 1 is no key"),
        ("ü" * 64, "line 1 is no key"),
    ],
)
def test_what_is_no_key(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in refused(f"file:{file_of(tmp_path, text)}")


def test_a_file_that_is_endless_is_not_read_to_its_end() -> None:
    assert "others may use the keys in /dev/zero" in refused("file:/dev/zero")


def test_a_variable_that_is_not_there() -> None:
    assert refused("env:NO_SUCH_KEYS") == "the node's environment has no variable NO_SUCH_KEYS"


def test_commands_that_fail(tmp_path: Path) -> None:
    assert refused("command:/no/such/thing x") == (
        "/no/such/thing cannot be run: No such file or directory"
    )
    assert "sh ended with status 3; what it said is in the node's log" in refused(
        f"command:sh -c 'echo {ONE}; exit 3'"
    )


def test_a_command_does_not_read_what_is_meant_for_the_node() -> None:
    """A node on demand gets its configuration on its standard input."""
    ours, end = os.pipe()
    os.write(end, ONE.encode())
    os.close(end)
    saved = os.dup(0)
    try:
        os.dup2(ours, 0)
        assert "cat yields no key" in refused("command:cat")
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(ours)


def test_a_command_runs_without_a_shell(tmp_path: Path) -> None:
    refused(f"command:echo none; touch {tmp_path}/made")
    assert not (tmp_path / "made").exists()


def test_what_a_command_says_is_logged_without_keys(caplog: pytest.LogCaptureFixture) -> None:
    script = f"echo 'the token expires soon: {OTHER}' >&2; echo {ONE}"
    with caplog.at_level(logging.DEBUG):
        assert read_keys(f'command:sh -c "{script}"', "o") == BOTH[:1]
    assert "sh: the token expires soon: [hidden]" in caplog.text
    assert ONE not in caplog.text
    assert OTHER not in caplog.text


def test_a_command_that_hangs_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_source, "COMMAND_S", 1.0)
    file = tmp_path / "child"
    # The child holds the pipes, so that waiting for their end alone would be for ever.
    (tmp_path / "hang.sh").write_text(f"sleep 60 & echo $! > {file}; wait")
    started = time.monotonic()
    assert refused(f"command:sh {tmp_path}/hang.sh") == "sh did not end within 1 s"
    assert time.monotonic() - started < 10
    child = int(file.read_text())
    while Path(f"/proc/{child}/stat").exists() and _state(child) != "Z":
        assert time.monotonic() - started < 10
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_nothing_of_a_command_is_left_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for command in (f"echo {ONE}", "false"):
        try:
            read_keys(f"command:{command}", "o")
        except ConfigError:
            continue
    assert set(os.listdir("/proc/self/fd")) == before
