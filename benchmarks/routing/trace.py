"""The trace: when each request came, how long it is, and which blocks its prompt is made of."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK_TOKENS = 512
SHIPPED = Path(__file__).parent / "data" / "conversation.txt.gz"
STAMPS_S = 3.0
"""The trace's clock; what has one stamp is spread evenly until the next."""


class Request(NamedTuple):
    """One line: seconds since the first, tokens of prompt and answer, blocks of the prompt."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read(path: Path = SHIPPED) -> list[Request]:
    """All requests in order of time, from the short form or from the published JSON lines."""
    if path.suffix == ".gz":
        return list(_spread(lengthen(gzip.decompress(path.read_bytes()).decode())))
    return list(_spread(published(path.read_text())))


def published(text: str) -> list[Request]:
    """What the published JSON lines say."""
    return [
        Request(line["timestamp"] / 1e3, line["input_length"], line["output_length"],
                tuple(line["hash_ids"]))
        for line in map(json.loads, text.splitlines())
    ]  # fmt: skip


def shorten(requests: Iterable[Request]) -> str:
    """The short form, without loss: a line each of the time in ms, the tokens of prompt and answer,
    the number of new blocks that end the prompt, and the runs of known ones that begin it.

    Raises:
        ValueError: new blocks are not numbered on.
    """
    lines, num_blocks = [], 0
    for request in requests:
        runs: list[list[int]] = []
        known = [block for block in request.blocks if block < num_blocks]
        new = len(request.blocks) - len(known)
        if request.blocks != (*known, *range(num_blocks, num_blocks + new)):
            raise ValueError(f"new blocks do not follow on {num_blocks}: {request.blocks}")
        num_blocks += new
        for block in known:
            if runs and block == sum(runs[-1]):
                runs[-1][1] += 1
            else:
                runs.append([block, 1])
        stamp = round(request.at_s * 1e3)
        words = [stamp, request.input_tokens, request.output_tokens, new]
        lines.append(" ".join([*map(str, words), *(f"{first}+{count}" for first, count in runs)]))
    return "".join(f"{line}\n" for line in lines)


def lengthen(text: str) -> list[Request]:
    """Undo `shorten`."""
    requests, num_blocks = [], 0
    for line in text.splitlines():
        stamp, length, answer, new, *runs = line.split()
        blocks: list[int] = []
        for run in runs:
            first, count = map(int, run.split("+"))
            blocks += range(first, first + count)
        blocks += range(num_blocks, num_blocks + int(new))
        num_blocks += int(new)
        requests.append(Request(int(stamp) / 1e3, int(length), int(answer), tuple(blocks)))
    return requests


def _spread(requests: list[Request]) -> Iterator[Request]:
    same = Counter(request.at_s for request in requests)
    seen: Counter[float] = Counter()
    for request in requests:
        later = STAMPS_S * seen[request.at_s] / same[request.at_s]
        seen[request.at_s] += 1
        yield request._replace(at_s=request.at_s + later)
