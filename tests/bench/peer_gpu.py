"""Prefill and decode of a Llama-3.1-8B shape by `transformers` on one GPU, random weights: the peer of `apbd bench prefill` and `apbd bench decode`.

    python tests/bench/peer_gpu.py --tokens 32768 131072

Prints one JSON line a measurement: prefill with PyTorch's flash and cuDNN attention (logits of the last token alone), then milliseconds a token over the cache
of the longest prefill. Run it beside `apbd bench` on the same card, one after the other.
"""
import argparse
import gc
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM


def model(attention="sdpa"):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=1 << 20, rope_theta=500000.0, tie_word_embeddings=False, attn_implementation=attention)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


def timed(run):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), result


def report(**figures):
    print(json.dumps({"peer": "transformers", "torch": torch.__version__, **figures}), flush=True)


def prefill(llama, n, backend, runs):
    ids = torch.randint(0, 128256, (1, n), device="cuda")
    times, cache = [], None
    for run in range(runs + 1):
        cache = None
        gc.collect()
        with sdpa_kernel(backend):
            ms, out = timed(lambda: llama(ids, use_cache=True, logits_to_keep=1))
        cache = out.past_key_values
        del out
        times += [ms] if run else []  # the first warms up
    seconds = statistics.median(times) / 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30
    report(what="prefill", attention=backend.name, tokens=n, seconds=round(seconds, 4), tokens_s=round(n / seconds), peak_gib=round(peak, 2))
    return cache


def decode(llama, n, cache, steps):
    token, times = torch.zeros(1, 1, dtype=torch.long, device="cuda"), []
    for _ in range(steps + 2):
        ms, out = timed(lambda: llama(token, past_key_values=cache, use_cache=True))
        token = out.logits[:, -1:].argmax(-1)
        times.append(ms)
    report(what="decode", tokens=n, ms_a_token=round(statistics.median(times[2:]), 3))


@torch.inference_mode()
def main():
    a = argparse.ArgumentParser()
    a.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    a.add_argument("--runs", type=int, default=1)
    a.add_argument("--steps", type=int, default=8)
    a = a.parse_args()
    llama = model()
    for n in a.tokens:
        cache = None
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            cache = None
            gc.collect()
            cache = prefill(llama, n, backend, a.runs)
        decode(llama, n, cache, a.steps)


if __name__ == "__main__":
    main()
