"""Sixteen requests at once over eight documents that KVStrata holds, and an engine without it."""

from __future__ import annotations

import sys

from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Ledger,
    Options,
    Prompts,
    Row,
    expect,
    main,
    milliseconds,
    say,
    spread,
)

from kvstrata.testing.workplace import Workplace

NAME = "concurrent"
NUM_DOCUMENTS = 8
SECOND_QUESTION = (
    "\n\nQuestion: How many sections has the text above, and why?\n\nAnswer: There are"
)


def measure(options: Options) -> list[Row]:
    """The one row of this benchmark."""
    prompts = Prompts(options.seed)
    count = NUM_DOCUMENTS // 2 if options.quick else NUM_DOCUMENTS
    first = prompts.make(count)
    both = [*first, *(prompts.with_question(prompt, SECOND_QUESTION) for prompt in first)]
    with Workplace(prompts.model, {"host.capacity": "2GiB"}) as place:
        ours, plain = place.engine(), place.engine(with_kvstrata=False)
        threads = {engine.wait()["threads"] for engine in (ours, plain)}
        expect(len(threads) == 1, "threads are bound unequally")
        ledger = Ledger(place.client())
        for prompt in first:
            ours.ask(prompt)
            plain.ask(prompt)
        ledger.next(count)
        ledger.drain(count * DOCUMENT_TOKENS // CHUNK_TOKENS)
        # Alone, every request splits its work in both engines alike: the answers must be equal.
        for prompt in both:
            ours.reset_prefix_cache()
            loaded, own = ours.ask(prompt), plain.ask(prompt)
            (record,) = ledger.next()
            expect(record["loaded_tokens"] == DOCUMENT_TOKENS, f"not from KVStrata: {record}")
            expect(own.cached_tokens == DOCUMENT_TOKENS, "not vLLM's own hit")
            expect(loaded.tokens == own.tokens, f"the answers differ: {loaded} and {own}")
        ratios: list[float] = []
        ours_s: list[float] = []
        plain_s: list[float] = []
        firsts: list[float] = []
        equal = 0
        rounds = 1 if options.quick else 3
        for number in range(rounds):
            answers = {}
            for engine in (ours, plain) if number % 2 else (plain, ours):
                engine.reset_prefix_cache()
                seconds, answers[engine] = engine.ask_all(both)
                (ours_s if engine is ours else plain_s).append(seconds)
            records = ledger.next(len(both))
            cached = {answer.cached_tokens for answer in answers[ours]}
            expect(cached == {DOCUMENT_TOKENS}, f"KVStrata's engine computed documents: {cached}")
            loaded_tokens = sum(record["loaded_tokens"] for record in records)
            expect(
                loaded_tokens >= count * DOCUMENT_TOKENS,
                f"only {loaded_tokens} tokens came from KVStrata",
            )
            # Here the two engines batch differently, and rounding may turn a close decision.
            pairs = zip(answers[ours], answers[plain], strict=True)
            equal += sum(a.tokens == b.tokens for a, b in pairs)
            ratios.append(ours_s[-1] / plain_s[-1])
            firsts += [answer.first_s for answer in answers[ours]]
        say("  " + milliseconds("first token, with KVStrata", firsts))
    ratio = spread(ratios)
    return [
        Row(
            NAME,
            f"{len(both)} requests at once over {count} warm documents, "
            "with KVStrata / with none (total time)",
            ratio.median,
            0.20,
            detail=f"{min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds; "
            f"{spread(ours_s).median:.2f} s and {spread(plain_s).median:.2f} s; "
            f"{equal} of {rounds * len(both)} first tokens equal across different batches",
        )
    ]


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
