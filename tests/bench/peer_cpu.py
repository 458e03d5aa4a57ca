"""Prefill of the fixture model by `transformers` with PyTorch's scaled-dot-product attention on the CPU: the peer of `cargo bench --bench cpu_prefill`.

    python tests/bench/peer_cpu.py --threads 4 --tokens 4096 16384 32768

Prints one JSON line a length. Needs torch and transformers. The logits are computed for the last token alone, as in apbd.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

FIXTURE_MODEL = Path(__file__).parents[2] / "fixtures" / "model"


@torch.inference_mode()
def seconds(model, ids):
    began = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--model", type=Path, default=FIXTURE_MODEL)
    a.add_argument("--threads", type=int, required=True)
    a.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    a.add_argument("--runs", type=int, default=3)
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    model = LlamaForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    seconds(model, torch.randint(6, model.config.vocab_size, (1, 512), generator=generator))
    for n in a.tokens:
        ids = torch.randint(6, model.config.vocab_size, (1, n), generator=generator)
        median = statistics.median(seconds(model, ids) for _ in range(a.runs))
        print(json.dumps({"peer": "transformers sdpa", "torch": torch.__version__, "threads": a.threads, "tokens": n, "seconds": round(median, 3),
                          "tokens_per_s": round(n / median)}), flush=True)


if __name__ == "__main__":
    main()
