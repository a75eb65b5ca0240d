"""The deployment's secret in its file: made once, two at most, exchanged whole; and its command."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata import cli
from kvstrata.errors import ConfigError
from kvstrata.secret import load_secrets, save_secrets, secret_check

SECRET = bytes(range(32))
OTHER = bytes(range(32, 64))


def test_a_secret_is_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    (secret,) = load_secrets(path)
    assert len(secret) == 32
    assert load_secrets(path) == (secret,) == (path.read_bytes(),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["secret"]
    assert load_secrets(tmp_path / "other") != (secret,)


def test_processes_that_start_at_once_agree_on_one_secret(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom kvstrata.secret import load_secrets\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"print(load_secrets({str(tmp_path / 'secret')!r})[0].hex())"
    )
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for starter in starters:
        assert starter.stdout
        assert starter.stdout.readline() == "ready\n"
    for starter in starters:
        assert starter.stdin
        starter.stdin.write("\n")
        starter.stdin.flush()
    said = {starter.communicate()[0].strip() for starter in starters}
    assert said == {(tmp_path / "secret").read_bytes().hex()}
    assert os.listdir(tmp_path) == ["secret"]


def test_who_comes_second_takes_the_first_ones_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    link = os.link

    def slower(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        assert len(load_secrets(path)) == 1
        link(source, target)

    monkeypatch.setattr(os, "link", slower)
    assert load_secrets(path) == load_secrets(path)
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"{path}: .*mode 0{mode:o}.*chmod 600 '{path}'"):
        load_secrets(path)
    path.chmod(0o400)
    assert load_secrets(path) == (SECRET,)


@pytest.mark.parametrize("size", [0, 31, 33, 63, 65, 96, 4096])
def test_a_secret_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(
        ConfigError,
        match=f"{path}: holds {size} bytes, expected 32, or twice as many for two secrets; copy",
    ):
        load_secrets(path)
    assert path.stat().st_size == size


def test_a_secret_that_cannot_be_read_or_made(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "secret"):
        with pytest.raises(ConfigError, match=f"{path}: cannot read or make the secret"):
            load_secrets(path)


# two of them


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_the_first_of_two_is_the_one_that_stores_use(tmp_path: Path) -> None:
    assert load_secrets(written(tmp_path / "secret", OTHER + SECRET)) == (OTHER, SECRET)


def test_a_secret_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "secret", SECRET * 2)
    with pytest.raises(ConfigError, match="holds one secret twice; run: truncate") as caught:
        load_secrets(path)
    subprocess.run(str(caught.value).partition("run: ")[2], shell=True, check=True)
    assert load_secrets(path) == (SECRET,), "what the error says helps"


def test_a_secret_is_exchanged_whole_and_stays_private(tmp_path: Path) -> None:
    path = written(tmp_path / "real", SECRET)
    link = tmp_path / "secret"
    link.symlink_to(path)
    before = path.stat().st_ino
    with path.open("rb") as reader:
        save_secrets(link, (OTHER, SECRET))
        assert reader.read() == SECRET, "who has it open reads all of the one before"
    assert link.is_symlink()
    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secrets(link) == (OTHER, SECRET)
    assert sorted(os.listdir(tmp_path)) == ["real", "secret"]


def test_what_cannot_be_exchanged_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "secret", SECRET)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot change the secret: No space left"):
        save_secrets(path, (OTHER,))
    assert load_secrets(path) == (SECRET,)
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_root_leaves_it_to_its_owner(tmp_path: Path) -> None:
    path = written(tmp_path / "secret", SECRET)
    os.chown(path, 4711, 4712)
    save_secrets(path, (OTHER,))
    assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)


# the command

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run ``kvstrata secret`` on ``tmp_path/secret``; answers exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        file = f"--set=secret_file={tmp_path / 'secret'}"
        monkeypatch.setattr("sys.argv", ["kvstrata", "secret", *arguments, file])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def test_a_rotation_step_by_step(tmp_path: Path, command: Command) -> None:
    path = written(tmp_path / "secret", SECRET)
    assert command("new")[0] == 0
    first, second = load_secrets(path)
    assert first == SECRET, "nobody stores by what the others do not know yet"
    assert second not in (SECRET, bytes(32))
    assert command("use")[0] == 0
    assert load_secrets(path) == (second, SECRET)
    code, out, _ = command()
    assert code == 0
    assert out.splitlines() == [
        str(path),
        f"{secret_check(second)}  stored by, and looked up",
        f"{secret_check(SECRET)}  looked up",
    ]
    assert command("forget")[0] == 0
    assert load_secrets(path) == (second,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_steps_that_are_out_of_order(tmp_path: Path, command: Command) -> None:
    path = written(tmp_path / "secret", SECRET)
    for step in ("use", "forget"):
        code, _, err = command(step)
        assert (code, "begin with: kvstrata secret new" in err) == (2, True)
    command("new")
    two = load_secrets(path)
    code, _, err = command("new")
    assert (code, "holds two secrets already; forget one" in err) == (2, True)
    assert load_secrets(path) == two


def test_the_command_makes_no_first_secret_and_prints_none(
    tmp_path: Path, command: Command
) -> None:
    for step in ((), ("new",)):
        code, _, err = command(*step)
        assert (code, "the first node makes it" in err) == (2, True)
    assert os.listdir(tmp_path) == []
    path = written(tmp_path / "secret", SECRET)
    said = "".join([*map(str, command("new")), *map(str, command("use")), *map(str, command())])
    for one in load_secrets(path):
        assert one.hex() not in said
        assert secret_check(one) in said
