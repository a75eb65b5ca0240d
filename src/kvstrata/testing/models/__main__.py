"""Make the named models and print their folders, one per line."""

from __future__ import annotations

import argparse
import sys

from kvstrata.testing.models import MODELS


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kvstrata.testing.models", description=__doc__)
    parser.add_argument("model", nargs="+", choices=sorted(MODELS), help="which to make")
    options = parser.parse_args(arguments)
    for name in options.model:
        print(MODELS[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
