"""``python -m kvstrata.cli``: the ``kvstrata`` command, where its script is not on the path."""

from kvstrata.cli import main

if __name__ == "__main__":
    main()
