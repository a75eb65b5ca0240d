"""Text to measure on, which every Python has."""

from __future__ import annotations


def english_text() -> str:
    """About 700 KB of real English prose: Python's own language reference, ``pydoc_data.topics``.

    The text is the same in each run of one Python version and differs between versions.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
