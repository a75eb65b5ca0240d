"""Say in words which system packages are missing, before an install or a compiler trips over it.

``--for venv`` asks for what a virtual environment needs, ``--for engine`` for what vLLM on the CPU
needs besides, ``--for sglang`` for what SGLang does, ``--for test`` for both and the servers that
tests start. ``--packages`` prints the Debian package names alone, for a script to install.
Only the standard library is used: this runs on the bare machine.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").exists()


def _has_openssl_headers() -> bool:
    return any(
        Path(place, "openssl/sha.h").exists() for place in ("/usr/include", "/usr/local/include")
    )


def missing(purpose: str) -> dict[str, str]:
    """Debian packages that are absent, each with what it is needed for."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = {}
    if importlib.util.find_spec("ensurepip") is None:
        found[f"{version}-venv"] = "the module ensurepip, to make a virtual environment"
    if purpose in ("engine", "test"):
        if not _loads("libnuma.so.1"):
            found["libnuma1"] = "libnuma.so.1, which vLLM's CPU kernels are linked with"
        if not _loads("libgomp.so.1"):
            found["libgomp1"] = "libgomp.so.1, which vLLM's CPU kernels are linked with"
    if purpose in ("engine", "sglang", "test"):
        if shutil.which("g++") is None:
            found["g++"] = (
                "a C++ compiler: torch compiles vLLM's forward pass with it, SGLang its page keys"
            )
        if not _has_headers():
            found[f"{version}-dev"] = "Python.h, which that compilation includes"
    if purpose in ("sglang", "test") and not _has_openssl_headers():
        # SGLang hashes pages in C++ that it compiles when it first starts: -lcrypto, sha.h.
        found["libssl-dev"] = "openssl/sha.h, which SGLang's compilation of its page keys includes"
    if purpose == "test" and shutil.which("ip") is None:
        found["iproute2"] = "the command ip: tests make bad networks of their own with it"
    if purpose == "test" and shutil.which("curl") is None:
        found["curl"] = "curl, with which tests run the examples of the API's page"
    if purpose == "test" and shutil.which("redis-server") is None:
        found["redis-server"] = "redis-server, which the tests of its tier start"
    if purpose == "test" and shutil.which("chromium") is None:
        found["chromium"] = "chromium, in which the tests open the dashboard"
    if purpose == "test":
        for package, library in (
            ("libnuma1", "libnuma.so.1"),
            ("libibverbs1", "libibverbs.so.1"),
            ("librdmacm1", "librdmacm.so.1"),
        ):
            if package not in found and not _loads(library):
                found[package] = f"{library}, which Mooncake's library is linked with"
    return found


def main() -> int:
    """Print what is missing; the exit status is 1 if that is anything."""
    parser = argparse.ArgumentParser(description=__doc__)
    purposes = ["venv", "engine", "sglang", "test"]
    parser.add_argument("--for", dest="purpose", choices=purposes, default="engine")
    parser.add_argument("--packages", action="store_true", help="names only, exit status 0")
    options = parser.parse_args()

    packages = missing(options.purpose)
    if options.packages:
        print(" ".join(packages))
        return 0
    # Each states it in its own metadata, but pip's message about that names no way out.
    who, oldest = {"venv": ("KVStrata", 10), "sglang": ("SGLang 0.5.23", 11)}.get(
        options.purpose, ("vLLM 0.32.0", 11)
    )
    if sys.version_info < (3, oldest):
        print(
            f"{who} needs Python 3.{oldest} or newer, this is {sys.version.split()[0]}. "
            "Begin again with another interpreter: make clean-all && make test PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    for package, reason in packages.items():
        print(f"missing: {package} ({reason})", file=sys.stderr)
    if packages:
        print(f"install with: apt-get install -y {' '.join(packages)}", file=sys.stderr)
    return 1 if packages else 0


if __name__ == "__main__":
    sys.exit(main())
