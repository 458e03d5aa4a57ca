"""Checks kernels/attention/hopper.cu on a Hopper card against its definition, and times it beside PyTorch's flash and cuDNN attention.

    nvcc -std=c++20 -Ikernels -DVARIANTS -cubin -gencode=arch=compute_90a,code=sm_90a -o hopper.cubin kernels/attention/hopper.cu
    python tests/bench/attention_gpu.py hopper.cubin [kernel ...]

Needs PyTorch alone: the cubin is loaded through the driver. Each kernel is checked in a process of its own with a time limit, so that one that hangs costs no other;
those that are right are timed in turns with the peers.
Prints one JSON line a case and a measurement; exits with 1 if a case fails.
"""
import ctypes
import json
import math
import subprocess
import sys

import torch
import torch.nn.functional as F

SECONDS_A_STEP = 60
MAX_MAPS = 96  # as in hopper.cu
KERNELS = {  # head dimension, consumer warpgroups, keys a tile, stages, stages of queries
    "attention_hopper_128": (128, 3, 80, 2, 1), "attention_hopper_64": (64, 3, 128, 2, 1), "hopper_128_3x80_3_stages": (128, 3, 80, 3, 1),
    "hopper_128_3x80_next_q": (128, 3, 80, 2, 2), "hopper_128_2x128_pp_eager": (128, 2, 128, 2, 1), "hopper_128_2x176_pp_lazy": (128, 2, 176, 2, 1),
    "hopper_64_2x128": (64, 2, 128, 2, 1), "hopper_64_3x96": (64, 3, 96, 2, 1), "hopper_64_2x160": (64, 2, 160, 2, 1),
}
BF16, SWIZZLE_128, PROMOTION_128 = 9, 3, 2  # of cuTensorMapEncodeTiled
DYNAMIC_SHARED = 8  # of cuFuncSetAttribute


class Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("heads", "kv_heads", "group", "q_stride", "kv_stride", "out_stride")] + [("scale", ctypes.c_float)]


class Plan(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("tasks", "segments", "works")]


class Output(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("out", "lse", "partial", "partial_lse")]


def call(name, *arguments):
    code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if code:
        raise SystemExit(f"{name}: error {code}")


def encode(to, matrix, first_row, rows, width, box_rows, head_dim):
    """A tensor map over `rows` rows, cut into columns of 64."""
    stride = matrix.stride(0) * 2
    sizes, strides = (ctypes.c_uint64 * 3)(64, max(rows, 1), width // 64), (ctypes.c_uint64 * 2)(stride, 128)
    box, ones = (ctypes.c_uint32 * 3)(64, box_rows, head_dim // 64), (ctypes.c_uint32 * 3)(1, 1, 1)
    call("cuTensorMapEncodeTiled", ctypes.c_void_p(to), BF16, 3, ctypes.c_void_p(matrix.data_ptr() + first_row * stride), sizes, strides, box, ones, 0,
         SWIZZLE_128, PROMOTION_128, 0)


def visible(segment, queries, query):
    """How many rows of a segment a query of a task sees."""
    _, _, rows, causal = segment
    return min(max(rows - queries + query + 1, 0), rows) if causal else rows


class Kernel:
    """One kernel of the cubin. A task is (first query, queries, [(source, first row, rows, causal)])."""

    def __init__(self, cubin, name):
        torch.zeros(1, device="cuda")  # makes the context
        self.head_dim, consumers, self.keys, stages, query_stages = KERNELS[name]
        self.rows, self.threads = 64 * consumers, 128 * (consumers + 1)
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(module), open(cubin, "rb").read())
        call("cuModuleGetFunction", ctypes.byref(self.function), module, name.encode())
        tiles = query_stages * self.rows * self.head_dim * 2 + 2 * stages * self.keys * self.head_dim * 2
        self.shared_bytes = (tiles + 256 + 1023) // 1024 * 1024
        call("cuFuncSetAttribute", self.function, DYNAMIC_SHARED, self.shared_bytes)
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def prepare(self, q, sources, tasks, heads, kv_heads, out, lse=None):
        memory = (ctypes.c_uint8 * (128 * (2 * MAX_MAPS + 2)))()
        maps = (ctypes.addressof(memory) + 127) // 128 * 128
        encode(maps, q, 0, q.shape[0], heads * self.head_dim, self.rows, self.head_dim)
        task_list, segment_list, works = [], [], []
        for number, (first, queries, segments) in enumerate(tasks):
            task_list += [first, queries, len(segment_list) // 5, len(segments)]
            for source, first_row, rows, causal in segments:
                index = len(segment_list) // 5
                for which, matrix in enumerate(sources[source]):
                    encode(maps + 128 * (1 + which * MAX_MAPS + index), matrix, first_row, rows, kv_heads * self.head_dim, self.keys, self.head_dim)
                segment_list += [source, first_row, rows, int(causal), index]
            for row in range(0, queries, self.rows):
                last = min(row + self.rows, queries) - 1
                works.append((number, row, 0, sum(-(-visible(s, queries, last) // self.keys) for s in segments), -1))
        works.sort(key=lambda work: -work[3])
        on_device = lambda values: torch.tensor(values or [0], dtype=torch.int32, device="cuda")
        lists = [on_device(task_list), on_device(segment_list), on_device([n for work in works for n in work])]
        self.counter = torch.zeros(1, dtype=torch.int32, device="cuda")
        shape = Shape(heads, kv_heads, heads // kv_heads, q.stride(0), sources[0][0].stride(0), out.stride(0), self.head_dim**-0.5)
        values = [shape, Plan(*[t.data_ptr() for t in lists]), ctypes.c_int(len(works) * heads), ctypes.c_uint64(self.counter.data_ptr()),
                  Output(out.data_ptr(), lse.data_ptr() if lse is not None else 0, 0, 0)]
        self.alive = [memory, lists, values]
        self.parameters = (ctypes.c_void_p * 6)(maps, *[ctypes.addressof(v) for v in values])

    def launch(self):
        self.counter.zero_()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call("cuLaunchKernel", self.function, self.blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, self.parameters, None)


def by_definition(q, sources, tasks, heads, kv_heads, head_dim, dtype):
    """Output and log-sum-exp; products in `dtype`, softmax in f32."""
    out = torch.full((q.shape[0], heads * head_dim), math.nan, device="cuda")
    lse = torch.full((q.shape[0], heads), math.nan, device="cuda")
    for first, queries, segments in tasks:
        index = torch.arange(queries, device="cuda")[:, None]
        masks = [torch.arange(r, device="cuda")[None] < (r - queries + index + 1 if causal else r) for _, _, r, causal in segments]
        part = lambda which: torch.cat([sources[s][which][f:f + r] for s, f, r, _ in segments]).view(-1, kv_heads, head_dim).to(dtype).repeat_interleave(heads // kv_heads, 1)
        k, v, mask = part(0), part(1), torch.cat([m.expand(queries, -1) for m in masks], 1)
        x = q[first:first + queries, : heads * head_dim].view(queries, heads, head_dim).to(dtype)
        scores = (torch.einsum("qhd,khd->hqk", x, k).float() * head_dim**-0.5).masked_fill(~mask, -math.inf)
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - total.nan_to_num(neginf=0.0)[..., None]).masked_fill(~mask, 0)
        out[first:first + queries] = torch.einsum("hqk,khd->qhd", weights.to(dtype), v).float().flatten(1)
        lse[first:first + queries] = total.t()
    return out, lse


def check(cubin, name, heads, kv_heads, tasks, source_rows, seed):
    kernel = Kernel(cubin, name)
    g, head_dim = torch.Generator("cuda").manual_seed(seed), kernel.head_dim
    rows = max(first + queries for first, queries, _ in tasks)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda").bfloat16()
    q = draw(rows, (heads + 2 * kv_heads) * head_dim)
    sources = [(draw(n, kv_heads * head_dim), draw(n, kv_heads * head_dim)) for n in source_rows]
    out = torch.full((rows, heads * head_dim), math.nan, device="cuda", dtype=torch.bfloat16)
    lse = torch.full((rows, heads), math.nan, device="cuda")
    kernel.prepare(q, sources, tasks, heads, kv_heads, out, lse)
    kernel.launch()
    torch.cuda.synchronize()
    first_run = out.clone()
    kernel.launch()
    torch.cuda.synchronize()
    arguments = (q, sources, tasks, heads, kv_heads, head_dim)
    (expected, expected_lse), (in_bf16, _) = by_definition(*arguments, torch.float32), by_definition(*arguments, torch.bfloat16)
    asked = torch.cat([torch.arange(first, first + queries) for first, queries, _ in tasks]).cuda()
    error = (out[asked].float() - expected[asked]).abs().max().item()
    bf16_error = (in_bf16[asked].bfloat16().float() - expected[asked]).abs().max().item()
    lse_error = (lse[asked] - expected_lse[asked]).nan_to_num(nan=0.0).abs().max().item()  # -inf - -inf
    same = torch.equal(first_run.view(torch.int16), out.view(torch.int16))
    others = torch.ones(rows, dtype=torch.bool, device="cuda").index_fill(0, asked, False)
    ok = error <= 2 * bf16_error + 1e-3 and lse_error < 2e-3 and same and bool(out[others].isnan().all())
    print(json.dumps({"kernel": name, "rows": rows, "heads": heads, "ok": ok, "error": error, "bf16_error": bf16_error, "lse_error": lse_error}), flush=True)
    return ok


def checks(cubin, name):
    rows = 64 * KERNELS[name][1]
    several = [(0, 7, [(0, 0, 7, True)]), (9, 81, [(1, 3, 17, False), (0, 0, 7, False), (0, 9, 81, True)]), (90, 1, [(1, 0, 0, False), (0, 90, 1, True)]),
               (95, 333, [(1, 20, 500, False), (0, 100, 300, True)])]
    cases = [
        (4, 2, [(0, rows, [(0, 0, rows, True)])], [rows]), (4, 2, [(0, 1000, [(0, 0, 1000, True)])], [1000]), (8, 2, several, [500, 600]),
        (2, 2, [(0, 5, [(0, 0, 2, True)]), (5, 3, [(0, 0, 0, False)])], [64]),
        (32, 8, [(0, 2048, [(1, 0, 1500, False), (1, 1500, 512, False), (0, 0, 2048, True)])], [2048, 2100]),
    ]
    return all([check(cubin, name, *case, seed) for seed, case in enumerate(cases)])


def peers(q, k, v):
    """PyTorch's attention by kernel, in the layout that is best for it: [1, heads, rows, head dimension], each head in one piece."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]

    def run(backend):
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return {name: lambda backend=backend: run(backend) for name, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]}


def in_turns(runs, rounds):
    """Times of each, ms. One after the other, round by round: a card that gets warmer or changes its clock does it to all."""
    times = {name: [] for name in runs}
    for at in range(rounds + 2):  # the first two warm up
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if at >= 2:
                times[name].append(begin.elapsed_time(end))
    return times


def median(values):
    return sorted(values)[len(values) // 2]


def compare(cubin, names):
    """All kernels of one head dimension and, on the same numbers, the peers. `to_cudnn`: median over the rounds of how many times as fast as cuDNN."""
    names = names.split(",")
    head_dim = KERNELS[names[0]][0]
    heads, kv_heads = 4096 // head_dim, 8
    whole = lambda n: (f"causal {n // 1024}K", n, [(0, 0, n, True)], n)
    last_host = ("last APB host at 128K", 16384, [(0, 0, 14336, False), (0, 14336, 4096, False), (0, 18432, 16384, True)], 34816)
    for what, queries, segments, keys in [whole(8192), whole(16384), whole(32768), whole(131072), last_host]:
        draw = lambda rows, width: torch.randn(rows, width * head_dim, device="cuda").bfloat16()
        q, k, v = draw(queries, heads + 2 * kv_heads), draw(keys, kv_heads), draw(keys, kv_heads)
        by_head = lambda x, n: x[:, : n * head_dim].view(-1, n, head_dim)
        runs = peers(by_head(q, heads), by_head(k, kv_heads), by_head(v, kv_heads)) if len(segments) == 1 else {}
        out = torch.empty(queries, heads * head_dim, device="cuda", dtype=torch.bfloat16)
        for name in names:
            kernel = Kernel(cubin, name)
            kernel.prepare(q, [(k, v)], [(0, queries, segments)], heads, kv_heads, out)
            runs[name] = kernel.launch
        flops = sum((4 * queries * rows - 2 * queries * queries * causal) * heads * head_dim for _, _, rows, causal in segments)
        times = in_turns(runs, 5 if queries > 100_000 else 21)
        for name, ms in times.items():
            ratios = [peer / own for peer, own in zip(times.get("cuDNN", []), ms)]
            print(json.dumps({"kernel": name, "head_dim": head_dim, "what": what, "ms": round(median(ms), 3), "tflops": round(flops / median(ms) / 1e9, 1),
                              "to_cudnn": round(median(ratios), 3) if ratios else None}), flush=True)
    return True


def apart(cubin, step, name=""):
    """Runs a step in a process of its own; whether it went well."""
    try:
        return subprocess.run([sys.executable, __file__, cubin, step, name], timeout=SECONDS_A_STEP).returncode == 0
    except subprocess.TimeoutExpired:
        print(json.dumps({"kernel": name, "step": step, "ok": False, "error": f"not done after {SECONDS_A_STEP} s"}), flush=True)
        return False


def main():
    cubin = sys.argv[1]
    names = [name for name in KERNELS if name in sys.argv[2:]] or list(KERNELS)
    if len(sys.argv) > 2 and sys.argv[2] not in KERNELS:
        raise SystemExit(0 if globals()[sys.argv[2]](cubin, sys.argv[3]) else 1)
    right = [name for name in names if apart(cubin, "checks", name)]
    for head_dim in (128, 64):
        alike = [name for name in right if KERNELS[name][0] == head_dim]
        if alike:
            apart(cubin, "compare", ",".join(alike))
    raise SystemExit(0 if len(right) == len(names) else 1)


if __name__ == "__main__":
    main()
