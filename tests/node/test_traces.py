"""What a node's process has traced arrives at a collector before the process is gone."""

from __future__ import annotations

from dataclasses import replace

from tests.node.conftest import wait_for_end
from tests.support.nodes import ORDER, RAW, chunk_keys
from tests.support.traces import collecting

from kvstrata.config import Config
from kvstrata.wire.launch import connect

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_an_on_demand_node_sends_its_spans_before_it_ends(config: Config) -> None:
    with collecting() as collector:
        tracing = replace(config.tracing, endpoint=collector.url)
        client = connect(replace(config, tracing=tracing))
        pid = client.hello.pid
        parent = f"00-{TRACE}-{SPAN}-01"
        client.match(chunk_keys(2), [0], [ORDER], [RAW], traceparent=parent).wait(10.0)
        client.match(chunk_keys(2), [0], [ORDER], [RAW]).wait(10.0)
        client.close()
        assert wait_for_end(pid, 20.0)
        (sent,) = collector.spans
    assert (sent.service, sent.name, sent.pid) == ("kvstrata-node", "kvstrata.node.match", pid)
    assert (sent.span.trace_id.hex(), sent.span.parent_span_id.hex()) == (TRACE, SPAN)
