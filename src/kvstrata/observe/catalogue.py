"""Every metric there is, declared once: what is counted must be in here.

A node counts under the bare name; on `/metrics` it has the prefix ``kvstrata_``. What the connector
counts inside an engine has the prefix ``vllm:kvstrata_`` on the engine's own `/metrics`.
`docs/metrics.md` is made from this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

NODE_PREFIX = "kvstrata_"
ENGINE_PREFIX = "vllm:kvstrata_"


class Kind(str, Enum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """One metric.

    Args:
        name: without its prefix, its unit at the end; a counter ends in ``_total``.
        kind: of metric.
        about: what it says, in a sentence.
        labels: names of its labels, each with few values.
        buckets: upper bounds of a histogram's, without the infinite one.
    """

    name: str
    kind: Kind
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


MATCH_S = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
CALL_S = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LOAD_S = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


def _counter(name: str, about: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, about, labels)


def _gauge(name: str, about: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, about, labels)


def _histogram(name: str, buckets: tuple[float, ...], about: str, *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, about, labels, buckets)


GROUPS: Mapping[str, tuple[Metric, ...]] = {
    "Requests": (
        _counter("requests_total", "Requests whose records engines handed in.", "outcome"),
        _counter("asked_tokens_total", "Prompt tokens of these requests."),
        _counter("engine_tokens_total", "Of them in the engine's own prefix cache."),
        _counter("hit_tokens_total", "Of them loaded from this node.", "tier"),
        _counter(
            "computed_tokens_total", "Of them computed, by the reason (docs/reasons.md).", "why"
        ),
        _counter(
            "ttft_saved_seconds_total",
            "Time to first token that loads saved: what computing the same tokens takes, by "
            "the engine's measured speed, less what the load took.",
        ),
        _counter("ttft_lost_seconds_total", "The same where the load took longer than computing."),
        _histogram("load_seconds", LOAD_S, "A request's load, from its blocks to its end.", "load"),
    ),
    "Lookups": (
        _counter("matches_total", "Matches that were answered."),
        _histogram(
            "match_seconds",
            MATCH_S,
            "A match inside the node, from its message to its answer.",
        ),
        _counter(
            "hit_chunks_total",
            "Chunks that matches found, by the slowest tier of each.",
            "tier",
        ),
        _counter(
            "inside_tokens_total",
            "Tokens found inside a chunk or tail that a prompt parts from.",
        ),
        _counter("missed_chunks_total", "Chunks that matches asked for and did not lease."),
        _counter(
            "matches_cut_total",
            "Matches that ended early for want of room or leases.",
            "why",
        ),
        _counter(
            "late_lookups_total",
            "Questions to a shared tier that were not answered in time.",
            "tier",
        ),
        _counter("lookup_rounds_total", "Round trips of questions to a shared tier.", "tier"),
    ),
    "Load or compute": (
        _counter(
            "plans_total",
            "Decisions of the planner over what slower tiers have: load all, part of it, compute, "
            "or meet, where an engine does both at once.",
            "decision",
        ),
        _counter(
            "computed_chunks_total",
            "Chunks that were found and left to the engine to compute.",
        ),
        _counter(
            "load_predicted_seconds_total",
            "What the planner reckoned that loads would take.",
        ),
        _counter("load_measured_seconds_total", "What these loads took."),
        _histogram(
            "load_error_ratio",
            RATIOS,
            "What a load took over what the planner had reckoned; 1: right.",
        ),
    ),
    "Host memory": (
        _gauge("host_capacity_bytes", "Size of the pool."),
        _gauge("host_used_bytes", "Bytes of the pool in use."),
        _gauge("host_populated_bytes", "Bytes of the pool that are faulted in."),
        _gauge("host_chunks", "Chunks in host memory."),
        _gauge("leases", "Leases that hold chunks still for readers."),
        _gauge("leased_bytes", "Bytes that they hold."),
        _gauge("reservations", "Reservations that writers are filling."),
        _gauge("kept_bytes", "Bytes kept for other nodes until these have them."),
        _counter("stored_objects_total", "Objects that engines committed."),
        _counter("verified_objects_total", "Objects that were verified in the background.", "tier"),
        _counter("unkept_objects_total", "Objects that could not be kept for another node."),
        _counter(
            "kept_in_vain_total",
            "Objects that were kept for another node, which did not come.",
        ),
    ),
    "Tiers": (
        _gauge(
            "tier_state",
            "1 for the state that a tier is in, 0 for the others.",
            "tier",
            "state",
        ),
        _gauge("tier_capacity_bytes", "Budget of a tier that the node owns.", "tier"),
        _gauge("tier_used_bytes", "Bytes that count against it.", "tier"),
        _gauge("tier_chunks", "Chunks in a tier that the node owns.", "tier"),
        _gauge(
            "tier_queued_bytes",
            "Bytes that wait to be written to a tier, or read from it.",
            "tier",
            "direction",
        ),
        _gauge("tier_calls", "Calls into a tier that wait for a thread, or run.", "tier", "lane"),
        _gauge("tier_scratch_bytes", "Buffers of a tier's codecs.", "tier"),
        _histogram(
            "tier_call_seconds",
            CALL_S,
            "A call into a tier, in its thread.",
            "tier",
            "call",
        ),
        _counter("tier_reads_total", "Reads from a tier.", "tier", "outcome"),
        _counter("tier_read_bytes_total", "Bytes that they brought.", "tier"),
        _counter("tier_writes_total", "Writes to a tier.", "tier", "outcome"),
        _counter("tier_write_bytes_total", "Bytes that they stored.", "tier"),
        _counter("tier_trips_total", "Times that a tier was left alone after an error.", "tier"),
        _counter("tiers_left_out_total", "Tiers that could not be opened.", "tier"),
        _counter(
            "promotions_total",
            "Objects on their way into host memory, by what became of them.",
            "outcome",
        ),
        _counter(
            "streamed_objects_total",
            "Objects that a load with a target read, by level.",
            "tier",
            "level",
        ),
        _counter(
            "write_behind_skipped_total",
            "Objects that were not written to a tier.",
            "tier",
            "why",
        ),
    ),
    "Contents": (
        _counter("entered_objects_total", "Objects that came into a tier of the node.", "tier"),
        _counter("left_objects_total", "Objects that left one, by cause.", "tier", "cause"),
        _counter("tier_clears_total", "Times that a tier of the node was emptied.", "tier"),
        _counter("evicted_chunks_total", "Chunks that a slower tier evicted.", "tier"),
        _counter("corrupt_objects_total", "Objects that failed their checksum.", "tier"),
        _counter(
            "cleared_objects_total",
            "Objects that were read, and had been cleared by what they are.",
            "tier",
        ),
        _counter(
            "incompatible_objects_total",
            "Objects of another release, codec or key that were left alone.",
            "tier",
        ),
    ),
    "Tenants": (
        _gauge("pins", "Pins that hold."),
        _gauge("pinned_bytes", "Bytes of a tier that pins keep from being evicted.", "tier"),
        _gauge("quotas", "Owners that have a quota in a tier.", "tier"),
        _gauge("owners", "Owners with something in a tier.", "tier"),
        _gauge("marks", "Clears that a tier holds what is read against.", "tier"),
        _counter(
            "over_quota_objects_total",
            "Objects that were not stored, since their owner had too much.",
            "tier",
        ),
    ),
    "Codecs": (
        _counter(
            "encoded_bytes_total",
            "Bytes before (raw) and after (stored) a tier's codec.",
            "tier",
            "of",
        ),
        _counter(
            "restored_bytes_total",
            "Raw bytes of objects that were verified, decrypted and decoded.",
            "tier",
        ),
        _counter("restored_seconds_total", "What that took, over all threads.", "tier"),
    ),
    "Other nodes": (
        _counter("peer_sent_bytes_total", "Bytes that other nodes have had of this one.", "by"),
        _counter("peers_refused_total", "Nodes that were refused.", "why"),
        _counter(
            "followed_chunks_total",
            "Chunks that came while another node's engine computed them.",
        ),
    ),
    "Canary": (
        _gauge(
            "canary_ok",
            "Whether the last canary came back from a tier as it was stored; 0: no.",
            "tier",
        ),
        _counter("canaries_total", "Canaries, by what became of them.", "tier", "outcome"),
        _histogram(
            "canary_seconds",
            CALL_S,
            "A canary's store, read back, and removal.",
            "tier",
            "verb",
        ),
    ),
    "The fleet": (
        _gauge(
            "fleet_ok",
            "Whether the node is in its fleet and has caught up with its commands; 0: no.",
        ),
        _gauge("fleet_untold_chunks", "Changes that the registry has not been told yet."),
        _gauge("fleet_clock_offset_seconds", "By how much the clock is ahead of the registry's."),
        _counter("fleet_events_total", "Changes that the registry was told."),
        _counter("fleet_event_gaps_total", "How often changes were lost before they were told."),
    ),
    "The node": (
        _gauge("node_info", "1; which release this is.", "release"),
        _gauge("uptime_seconds", "Since the node started."),
        _counter("requests_refused_total", "Messages that were refused.", "request"),
        _counter("jobs_total", "An operator's jobs that have ended.", "kind", "state"),
        _counter("disconnects_total", "Clients that were disconnected.", "why"),
        _counter("bugs_total", "Errors that nobody foresaw; the log has their trace.", "where"),
    ),
}
"""What a node counts, and its state."""

ENGINE: tuple[Metric, ...] = (
    _counter("asked_tokens_total", "Prompt tokens of requests that have ended."),
    _counter("hit_tokens_total", "Tokens that were loaded from KVStrata.", "tier"),
    _counter(
        "missed_requests_total",
        "Requests that loaded nothing or less than they might.",
        "why",
    ),
    _counter(
        "loads_total", "Loads of requests that were not aborted meanwhile.", "load", "outcome"
    ),
    _histogram("load_seconds", LOAD_S, "A load, from its blocks to its end.", "load"),
    _counter(
        "blended_tokens_total",
        "Of the loaded ones, those that were reused at another place, by the plan.",
        "plan",
    ),
    _counter("recomputed_tokens_total", "Tokens that were computed inside blends."),
    _counter("stored_bytes_total", "Bytes that the workers copied out and committed."),
    _counter("stores_dropped_total", "Stores that came to nothing.", "why"),
    _counter("unrecorded_requests_total", "Requests whose record could not be handed in."),
)
"""What the connector counts inside an engine."""


def by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Metrics by their names.

    Raises:
        AssertionError: two have one name.
    """
    found = {}
    for metric in metrics:
        assert metric.name not in found, f"{metric.name} is declared twice"
        found[metric.name] = metric
    return found


NODE: Mapping[str, Metric] = by_name(metric for group in GROUPS.values() for metric in group)
"""What a node counts, by name."""
