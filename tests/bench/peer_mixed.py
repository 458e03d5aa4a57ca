"""How long `transformers` takes for a mix of documents, one after the other, on one GPU: the peer of `apbd` working through the same mix in batches.

    python tests/bench/peer_mixed.py                            # 64 documents of 4,096 to 131,072 tokens, 256 generated each
    python tests/bench/peer_mixed.py --mix mix.json             # [[tokens in, tokens out], ...]

A Llama-3.1-8B shape with random weights. Prefill and decode are measured at a few lengths with a few generated tokens, attention by FlashAttention where that
package is installed, else by PyTorch's own kernels (flash and cuDNN, the faster counts at each length). What a length between them takes is interpolated:
seconds a prefilled token, and milliseconds a generated token, are linear between two lengths that were measured. Loading, tokenizing and text are not counted.
Prints one JSON line a measurement, and last the mix. Ends within --seconds: what does not fit any more is left out, the longest lengths with one backend first of all.
"""
import argparse
import gc
import importlib.util
import json
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer_gpu import model, report, timed

LENGTHS = [4096, 16384, 32768, 65536, 131072]
BEGAN = time.monotonic()


def default_mix(documents, generated):
    """Lengths in equal ratios from 4,096 to 131,072."""
    last = max(documents - 1, 1)
    return [(round(4096 * 32 ** (i / last)), generated) for i in range(documents)]


def backends():
    """Names of the kernels to try, the one that is fastest at long lengths first, each with what selects it."""
    if importlib.util.find_spec("flash_attn"):
        return "flash_attention_2", {"flash_attention_2": None}
    return "sdpa", {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def prefill(llama, n, backend, runs):
    """Seconds of a prefill, and its cache."""
    ids = torch.randint(0, 128256, (1, n), device="cuda")
    times, cache = [], None
    for _ in range(runs):
        cache = None
        gc.collect()
        call = lambda: llama(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
        if backend is None:
            ms, out = timed(call)
        else:
            with sdpa_kernel(backend):
                ms, out = timed(call)
        cache = out.past_key_values
        del out
        times.append(ms / 1e3)
    return min(times), cache


def decode(llama, cache, steps):
    """Milliseconds a token over a cache."""
    token, times = torch.zeros(1, 1, dtype=torch.long, device="cuda"), []
    for _ in range(steps + 2):
        ms, out = timed(lambda: llama(token, past_key_values=cache, use_cache=True))
        token = out.logits[:, -1:].argmax(-1)
        times.append(ms)
    return statistics.median(times[2:])


def between(measured, n):
    """Linear between two lengths, and as at the nearest beyond them."""
    lengths = sorted(measured)
    if n <= lengths[0] or n >= lengths[-1]:
        return measured[lengths[0] if n <= lengths[0] else lengths[-1]]
    above = next(length for length in lengths if length >= n)
    below = max(length for length in lengths if length < above)
    share = (n - below) / (above - below)
    return measured[below] * (1 - share) + measured[above] * share


def measure(llama, names, steps, seconds):
    """Seconds a prefilled token and milliseconds a generated token, by length."""
    a_token, generated = {}, {}
    for n in LENGTHS:
        fastest = None
        for name, backend in names.items():
            # A run is about quadratic in its length at the long end; what is known of the last one says what the next may take.
            last = max(a_token, default=None)
            expected = 0 if last is None else a_token[last] * n * (n / last) * 1.7
            if fastest is not None and time.monotonic() - BEGAN + expected > seconds:
                report(what="left out", attention=name, tokens=n)
                continue
            cache = None
            gc.collect()
            took, cache = prefill(llama, n, backend, 2 if n <= 32768 else 1)
            report(what="prefill", attention=name, tokens=n, seconds=round(took, 4), tokens_s=round(n / took))
            fastest = took if fastest is None else min(fastest, took)
        a_token[n] = fastest / n
        generated[n] = decode(llama, cache, steps)
        report(what="decode", tokens=n, ms_a_token=round(generated[n], 3))
        del cache
    return a_token, generated


@torch.inference_mode()
def main():
    a = argparse.ArgumentParser()
    a.add_argument("--mix", help="file with [[tokens in, tokens out], ...]")
    a.add_argument("--documents", type=int, default=64)
    a.add_argument("--generated", type=int, default=256)
    a.add_argument("--steps", type=int, default=6)
    a.add_argument("--seconds", type=float, default=170)
    a = a.parse_args()
    mix = json.load(open(a.mix)) if a.mix else default_mix(a.documents, a.generated)
    implementation, names = backends()
    llama = model(implementation)
    prefill(llama, 1024, next(iter(names.values())), 1)  # warms up
    a_token, generated = measure(llama, names, a.steps, a.seconds)
    prefills = sum(n * between(a_token, n) for n, _ in mix)
    decodes = sum(new * between(generated, n) for n, new in mix) / 1e3
    report(what="mix", documents=len(mix), tokens_in=sum(n for n, _ in mix), tokens_out=sum(new for _, new in mix), prefill_s=round(prefills, 1),
           decode_s=round(decodes, 1), seconds=round(prefills + decodes, 1), documents_an_hour=round(len(mix) * 3600 / (prefills + decodes), 1),
           took_s=round(time.monotonic() - BEGAN))


if __name__ == "__main__":
    main()
