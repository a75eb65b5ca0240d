"""Who may ask the API: tokens where others reach it, no page of another site anywhere."""

from __future__ import annotations

import os
import ssl
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from tests.support.apis import Rig
from tests.support.certificates import certificates

from kvstrata.config import load_config
from kvstrata.config.api import ApiConfig
from kvstrata.control import Client, run
from kvstrata.control.access import Tokens, cross_site, load_tokens, misdirected, own_token
from kvstrata.control.app import READS, build
from kvstrata.control.client import ApiProblem
from kvstrata.errors import ConfigError

READER, WRITER = "reader-0123456789", "writer-0123456789"
FILE = f"read: {READER}\nwrite:{WRITER}\n"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def open_rig(folder: Path) -> Iterator[Rig]:
    (folder / "open").mkdir()
    rig = Rig(folder / "open")
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def token_rig(folder: Path) -> Iterator[Rig]:
    file = folder / "tokens"
    file.write_text(FILE)
    file.chmod(0o600)
    (folder / "token").mkdir()
    rig = Rig(folder / "token", {"api.token_file": str(file)})
    yield rig
    rig.close()


def config(listen: str = "127.0.0.1:0", file: Path | None = None) -> ApiConfig:
    overrides = {"api.listen": listen, **({"api.token_file": str(file)} if file else {})}
    return load_config(environ={}, overrides=overrides).api


# tokens


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_reading_and_writing_take_a_token_of_their_own(token_rig: Rig) -> None:
    everything = {"everything": True}
    for headers in ({}, bearer("unknown-0123456789"), {"Authorization": f"Basic {WRITER}"}):
        for method, path in [("GET", "/v1/status"), ("POST", "/v1/clear"), ("GET", "/v1/nothing")]:
            answer = token_rig.ask(method, path, None, headers)
            assert answer.problem["status"] == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
    assert token_rig.ask("GET", "/v1/status", None, bearer(READER)).status == 200
    assert token_rig.ask("POST", "/v1/clear", everything, bearer(READER)).problem["status"] == 403
    assert token_rig.ask("POST", "/v1/clear", everything, bearer(WRITER)).status == 200
    assert token_rig.ask("GET", "/v1/status", None, bearer(WRITER)).status == 200
    looked = token_rig.ask("POST", "/v1/lookup", {"tokens": [1]}, bearer(READER))
    assert looked.status == 422, "it may ask, and no engine has told of its model"
    for path in ("/v1/health", "/v1/ready"):
        assert token_rig.ask("GET", path).status == 200
    across = {"request": "nobody", "across_tenants": True}
    assert token_rig.ask("POST", "/v1/explain", across, bearer(READER)).problem["status"] == 403
    assert token_rig.ask("POST", "/v1/explain", across, bearer(WRITER)).problem["status"] == 404
    own = {**across, "across_tenants": False}
    assert token_rig.ask("POST", "/v1/explain", own, bearer(READER)).problem["status"] == 404
    routed = {"nodes": {"a": 0}, "tokens": [1]}
    assert token_rig.ask("POST", "/v1/route", routed, bearer(READER)).status == 200


def test_a_token_for_reading_writes_nowhere(folder: Path, token_rig: Rig) -> None:
    _, app = build(token_rig.config)
    posted = {
        path for path, verbs in app.openapi()["paths"].items() if set(verbs) - {"get"}
    }  # fmt: skip
    assert posted - set(READS)
    for path in posted - set(READS):
        path = path.replace("{id}", "api-1")
        assert token_rig.ask("POST", path, None, bearer(READER)).problem["status"] == 403, path


def test_another_address_needs_a_token(folder: Path) -> None:
    for listen in ("0.0.0.0:0", "[::]:0", "192.0.2.1:7780", "node-a:7780"):
        with pytest.raises(ConfigError, match=r"api\.token_file: missing") as caught:
            load_tokens(config(listen), {})
        assert "KVSTRATA_API_TOKEN" in str(caught.value)
        assert load_tokens(config(listen), {"KVSTRATA_API_TOKEN": WRITER}) is not None
    for listen in ("127.0.0.1:0", "127.1.2.3:0", "localhost:0", "[::1]:0", f"unix:{folder}/a"):
        assert load_tokens(config(listen), {}) is None


def test_a_process_on_another_address_refuses_to_start(folder: Path) -> None:
    (folder / "other").mkdir()
    with pytest.raises(ConfigError, match=r"api\.token_file"):
        Rig(folder / "other", {"api.listen": "0.0.0.0:0"}, lives=False)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(FILE)
    for mode in (0o644, 0o640, 0o604):
        file.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            load_tokens(config(file=file), {})
    file.chmod(0o600)
    assert load_tokens(config(file=file), {}) is not None
    with pytest.raises(ConfigError, match="cannot read"):
        load_tokens(config(file=tmp_path / "none"), {})


@pytest.mark.parametrize(
    "text", ["", "short", "admin: token-0123456789abc", "read: two words-0123456789", "x" * 300]
)
def test_what_holds_no_tokens_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Tokens.parse(text, "the file")
    assert caught.value.path == "the file"
    assert not text or text not in str(caught.value)


tokens = st.text("abcdefghijklmnopqrstuvwxyz0123456789-._~", min_size=16, max_size=40)


@given(st.lists(st.tuples(tokens, st.sampled_from(["read", "write"])), min_size=1, max_size=6))
def test_rights_are_those_that_were_given(pairs: list[tuple[str, str]]) -> None:
    known = Tokens.parse("\n".join(f"{right}: {token}" for token, right in pairs), "file")
    for token, _ in pairs:
        rights = {right for one, right in pairs if one == token}
        assert known.right(token) == ("write" if "write" in rights else "read")
        assert known.right(token + "x") in ("", *{r for t, r in pairs if t == token + "x"})
        assert known.right(token[:-1]) in ("", *{r for t, r in pairs if t == token[:-1]})
    assert known.right("") == ""
    assert known.right("é" * 20) == ""


def test_a_command_shows_the_token_that_may_write(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(FILE)
    file.chmod(0o600)
    assert own_token(config(file=file), {}) == WRITER
    assert own_token(config(), {"KVSTRATA_API_TOKEN": f"read:{READER}"}) == READER
    assert own_token(config(), {}) is None


# browsers


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7780", "127.0.0.1.evil.example", "localhost.evil.example",
     "10.0.0.1", "127.0.0.1@evil.example", "evil.example#127.0.0.1", "[::2]", "", "0.0.0.0"],
)  # fmt: skip
def test_a_name_that_was_rebound_to_this_machine_is_refused(open_rig: Rig, host: str) -> None:
    port = open_rig.port
    for method, path in [("GET", "/v1/status"), ("POST", "/v1/flush"), ("GET", "/v1/health")]:
        headers = {"Host": host.replace("7780", str(port)), "Origin": f"http://{host}"}
        assert open_rig.ask(method, path, None, headers).problem["status"] == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:{port}", "LOCALHOST", "[::1]:{port}"])
def test_a_name_of_this_machine_is_taken(open_rig: Rig, host: str) -> None:
    headers = {"Host": host.format(port=open_rig.port)}
    assert open_rig.ask("GET", "/v1/status", None, headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example", "Content-Type": "application/json"},
    ],
)
def test_a_page_of_another_site_cannot_act(open_rig: Rig, headers: dict[str, str]) -> None:
    assert open_rig.ask("POST", "/v1/flush", None, headers).problem["status"] == 403


def test_no_other_site_may_read_the_answers(open_rig: Rig) -> None:
    """No CORS: a browser's question beforehand is no answer, and no header allows anything."""
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    asked = open_rig.ask("OPTIONS", "/v1/clear", None, origin)
    plain = open_rig.ask("GET", "/v1/status")
    for answer in (asked, plain):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert asked.status == 403


def test_the_apis_own_page_may_act(open_rig: Rig) -> None:
    own = {"Origin": open_rig.url, "Sec-Fetch-Site": "same-origin"}
    assert open_rig.ask("POST", "/v1/flush", None, own).status == 200


def test_two_hosts_are_none(open_rig: Rig) -> None:
    with open_rig.raw() as raw:
        raw.sendall(
            b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n"
            b"Connection: close\r\n\r\n"
        )
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.startswith((b"HTTP/1.1 421", b"HTTP/1.1 400"))
    assert b"application/problem+json" in answer


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_no_name_but_this_machines_is_taken(host: str) -> None:
    if not misdirected(host, local=True):
        assert host.lower().startswith(("127.", "localhost", "[::1]"))
        assert not host.rpartition("]")[2].rpartition(":")[0].count(":")
    assert not misdirected(host, local=False)


@given(st.text(max_size=30), st.text(max_size=30))
def test_an_origin_is_the_host_or_foreign(origin: str, host: str) -> None:
    if not cross_site("POST", {"origin": origin, "host": host}):
        assert origin.lower().partition("//")[2].startswith(host.lower()) or not host


# other ways in


def test_a_unix_socket_is_for_this_user(folder: Path) -> None:
    (folder / "unix").mkdir()
    path = folder / "unix/api.sock"
    rig = Rig(folder / "unix", {"api.listen": f"unix:{path}"})
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with rig.client() as client:
            assert client.version().node_pid == os.getpid()
        with pytest.raises(ConfigError, match=r"api\.listen: somebody listens"):
            Rig(folder / "unix", {"api.listen": f"unix:{path}"}, lives=False)
    finally:
        rig.close()
    assert not path.exists()


def test_https_with_a_token(folder: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files: dict[str, Any] = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    certificate.private_key_pem.write_to_path(str(files["key"]))
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(files["cert"]), append=number > 0)
    tokens_file = folder / "https-tokens"
    tokens_file.write_text(FILE)
    tokens_file.chmod(0o600)
    (folder / "https").mkdir()
    options = {
        "api.token_file": str(tokens_file),
        "api.tls_certificate": str(files["cert"]),
        "api.tls_key": str(files["key"]),
    }
    rig = Rig(folder / "https", options)
    try:
        assert rig.url.startswith("https://")
        with rig.client(certificates=files["ca"], token=READER) as client:
            assert client.status().pid == os.getpid()
            with pytest.raises(ApiProblem, match="may read only"):
                client.flush()
        with rig.client(certificates=files["ca"]) as client:
            with pytest.raises(ApiProblem) as caught:
                client.status()
            assert caught.value.problem.status == 401
    finally:
        rig.close()


def test_a_handshake_that_does_not_come_is_hung_up_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "HEAD_S", 0.2)
    files = certificates(folder)
    (folder / "silent").mkdir()
    options = {
        "api.tls_certificate": files["network.certificate"],
        "api.tls_key": files["network.key"],
    }
    rig = Rig(folder / "silent", options, lives=False)
    try:
        with rig.raw() as silent:
            assert silent.recv(1) == b""
    finally:
        rig.close()


def test_wrong_certificates_are_an_error_of_the_configuration(folder: Path) -> None:
    (folder / "wrong.pem").write_text("no certificate")
    (folder / "wrong").mkdir()
    options = {name: str(folder / "wrong.pem") for name in ("api.tls_certificate", "api.tls_key")}
    with pytest.raises(ConfigError, match=r"api\.tls_certificate"):
        Rig(folder / "wrong", options, lives=False)
    with pytest.raises(ConfigError, match=r"api\.tls_key: missing"):
        load_config(environ={}, overrides={"api.tls_certificate": "/a.pem"})


def test_an_address_in_use_is_an_error_of_the_configuration(folder: Path, open_rig: Rig) -> None:
    (folder / "used").mkdir()
    with pytest.raises(ConfigError, match=r"api\.listen: cannot listen"):
        Rig(folder / "used", {"api.listen": f"127.0.0.1:{open_rig.port}"}, lives=False)


def test_the_certificate_is_asked_for(folder: Path) -> None:
    with pytest.raises((FileNotFoundError, ssl.SSLError)):
        Client("https://127.0.0.1:1", certificates=folder / "none.pem")
