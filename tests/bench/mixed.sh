#!/usr/bin/env bash
# A mixed lot of documents on one GPU, all brought at once, beside `transformers` working through the same lot one by one on the same card: documents an hour, and
# the share of the time that the GPU was busy (nvidia-smi's utilisation, over the lot's own seconds).
#
#   APBD=target/release/apbd tests/bench/mixed.sh [folder for the figures]
set -uo pipefail
cd "$(dirname "$0")/../.."
apbd=${APBD:-target/release/apbd}
out=${1:-$(mktemp -d)}
mkdir -p "$out"

nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader,nounits --loop-ms=200 |
  while read -r line; do echo "$(date +%s.%N), $line"; done >"$out/utilisation.csv" &
sampler=$!
trap 'kill $sampler 2>/dev/null' EXIT
timeout 280 "$apbd" bench mixed --attention apb --format json ${MIXED:-} >"$out/mixed.json" || echo "mixed: exit $?"
kill $sampler
timeout 220 python3 tests/bench/peer_mixed.py --seconds 190 >"$out/peer.jsonl" || echo "peer: exit $?"

python3 - "$out" <<'PYTHON'
import json, pathlib, statistics, sys

out = pathlib.Path(sys.argv[1])
samples = [tuple(map(float, line.split(","))) for line in (out / "utilisation.csv").read_text().splitlines() if line.count(",") == 2]
peer = [json.loads(line) for line in (out / "peer.jsonl").read_text().splitlines() if line.startswith("{")]
for row in json.loads((out / "mixed.json").read_text()):
    if row.get("what") != "mixed":
        continue
    began, ended = row["began_epoch_s"], row["began_epoch_s"] + row["seconds"]
    busy = [busy for at, busy, _ in samples if began <= at <= ended]
    row["gpu_busy_percent"] = round(statistics.mean(busy), 1) if busy else None
    print(json.dumps(row))
for row in peer:
    print(json.dumps(row))
PYTHON
