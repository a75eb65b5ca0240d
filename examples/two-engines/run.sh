#!/usr/bin/env bash
# Two vLLM with a node each, as on two machines: the second loads what the first has computed.
#
#     examples/two-engines/run.sh [MODEL]
#
# With a Python that has vLLM and KVStrata (PYTHON=...); without a GPU too. MODEL is a name on the
# hub or a folder; without it the small model that the tests use. Everything is on 127.0.0.1 and in
# /tmp/kvstrata-two-engines, and ends with this script.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
folder=/tmp/kvstrata-two-engines
model=${1:-$("$python" -m kvstrata.testing.models smollm2)}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

umask 077
mkdir "$folder"  # fails where another run is under way
started=()
finish() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 1' INT TERM

# Return once a command succeeds; end if it does not within five minutes, or process $1 has ended.
until_ready() {
    local pid=$1 log=$2
    shift 2
    for _ in $(seq 600); do
        if "$@" >/dev/null 2>&1; then return; fi
        if ! kill -0 "$pid" 2>/dev/null; then break; fi
        sleep 0.5
    done
    echo "it did not start; the end of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
}

answers() {
    "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)' "$1"
}

kvstrata() {
    "$python" -c 'from kvstrata.cli import main; main()' "$@"
}

for name in a b; do
    "$python" -c 'from kvstrata.cli import main; main()' serve --config "$name.toml" \
        >"$folder/node-$name.log" 2>&1 &
    started+=($!)
    until_ready $! "$folder/node-$name.log" kvstrata status --config "$name.toml"
done
echo "two nodes, and each finds the other:"
kvstrata doctor --config a.toml --peer 127.0.0.1:17789
kvstrata doctor --config b.toml --peer 127.0.0.1:17788

port=18001
for name in a b; do
    "$python" -m vllm.entrypoints.openai.api_server \
        --host 127.0.0.1 --port "$port" --model "$model" --served-model-name m \
        --dtype bfloat16 --max-model-len 4096 \
        --kv-transfer-config "{\"kv_connector\": \"KVStrataConnector\",
            \"kv_connector_module_path\": \"kvstrata.connectors.vllm\",
            \"kv_role\": \"kv_both\", \"kv_load_failure_policy\": \"recompute\",
            \"kv_connector_extra_config\": {\"node\": \"unix:$folder/$name.sock\"}}" \
        >"$folder/vllm-$name.log" 2>&1 &
    started+=($!)
    echo "engine $name starts on port $port ..."
    until_ready $! "$folder/vllm-$name.log" answers "http://127.0.0.1:$port/health"
    port=$((port + 1))
done

"$python" ask.py http://127.0.0.1:18001 http://127.0.0.1:18002

echo "what node b says of it:"
kvstrata status --config b.toml
kvstrata status --config a.toml --json >"$folder/a.json"
echo "and why the two share:"
kvstrata doctor --config b.toml --against "$folder/a.json"
