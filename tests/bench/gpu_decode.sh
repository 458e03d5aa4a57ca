#!/usr/bin/env bash
# Checks and times what decode is made of on one GPU, in under five minutes: batches, FP8 caches, the kernels of products of few rows.
#
#   APBD=target/release/apbd TESTS=target/debug/deps/cuda-0123456789abcdef tests/bench/gpu_decode.sh [folder for the full figures]
#
# TESTS may be left out: then nothing is checked. With HOPPER=hopper.cubin (built as attention_gpu.py says) variants of the prefill kernel are timed too. Prints a table last; a part that fails or takes too long is named in it.
set -uo pipefail
cd "$(dirname "$0")/../.."
apbd=${APBD:-target/release/apbd}
out=${1:-$(mktemp -d)}
mkdir -p "$out"

# Seconds, name, command: its JSON goes to a file of that name.
part() {
  local seconds=$1 name=$2
  shift 2
  timeout "$seconds" "$@" >"$out/$name.json" 2>"$out/$name.log" || echo "$name: exit $?, $(tail -n 1 "$out/$name.log")" >>"$out/failed"
}
bench() {
  local name=$1
  shift
  part 60 "$name" "$apbd" bench decode --format json "$@"
}

: >"$out/failed"
if [ -n "${TESTS:-}" ]; then
  for filter in few_rows other_kernels own_place next_tokens batch fp8 linear_layers mlp likeliest draws few_queries long_cache; do
    APBD_REQUIRE_GPU=1 timeout 60 "$TESTS" "$filter" --skip shipped >"$out/test-$filter.log" 2>&1 || echo "test $filter: exit $?, $(grep -m 1 -i panicked -A 1 "$out/test-$filter.log" | tail -n 1)" >>"$out/failed"
    grep -h '^test result' "$out/test-$filter.log" | sed "s/^/$filter: /"
  done
fi

bench native-32k --batch 1,2,4,8,12 --tokens 32k
bench fp8-32k --batch 1,2,4,8,16 --tokens 32k --kv-cache fp8
bench native-128k --batch 1,2 --tokens 128k
bench fp8-128k --batch 1,2,4 --tokens 128k --kv-cache fp8
bench vector-native --batch 1 --tokens 32k,128k --products vector
bench library-native --batch 1,2,8 --tokens 32k --products library
bench skinny-4k --batch 16,32,64 --tokens 4k
bench library-4k --batch 16,32,64 --tokens 4k --products library
bench engine --attention full --tokens 32k,128k
if [ -n "${HOPPER:-}" ]; then
  timeout 120 python3 tests/bench/attention_gpu.py "$HOPPER" attention_hopper_128 hopper_128_3x80_next_q hopper_128_3x80_3_stages | tee "$out/hopper.log" ||
    echo "hopper: exit $?" >>"$out/failed"
fi

python3 - "$out" <<'PYTHON'
import glob, json, os, sys

rows = []
for path in sorted(glob.glob(os.path.join(sys.argv[1], "*.json"))):
    try:
        found = json.load(open(path))
    except ValueError:
        continue
    copy = next((row["copy_gb_s"] for row in found if row.get("what") == "ceilings"), None)
    for row in found:
        if row.get("what") == "decode":
            rows.append((os.path.basename(path)[:-5], copy, row))
columns = ["tokens", "batch", "ms_a_step", "ms_a_token", "floor_ms", "tokens_s", "gb_s", "attention_ms", "linear_ms", "linear_add_ms", "mlp_ms", "rms_norm_ms",
           "rope_store_ms", "next_tokens_ms"]
print("part".ljust(16), "copy".rjust(5), *(name.removesuffix("_ms")[:9].rjust(9) for name in columns))
for name, copy, row in rows:
    print(name.ljust(16), str(copy).rjust(5), *(str(row.get(column, ""))[:9].rjust(9) for column in columns))
PYTHON
if [ -s "$out/failed" ]; then
  echo "FAILED:"
  cat "$out/failed"
  exit 1
fi
