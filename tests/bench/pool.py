#!/usr/bin/env python3
"""The pool on several GPUs of one machine: parity, prefill, decode, shapes, the peer, and an engine that dies. Builds nothing.

    tests/bench/pool.py --apbd target/release/apbd --out tests/bench/results/pool parity prefill long shapes decode peer kill

Takes as many GPUs as the machine has. Each part is a list of runs; each run writes one JSON file, and a file that is there is not made again, so that a part
that was cut off goes on where it was. `--budget SECONDS` ends it before that: no run is begun that may not come to its end. `--list` shows the runs.
`summary` writes all figures to summary.json; plot.py draws them.
"""
import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "fixtures/model"
PARTS = ["parity", "documents", "prefill", "long", "shapes", "decode", "peer", "kill"]
# What the paper's tables have, and the lengths that one GPU takes too long for.
SHORT, LONG = ["32k", "64k", "128k"], ["256k", "512k", "1m"]


def gpus_there_are():
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def thousands(tokens):
    """Of a length such as 32k or 1m, in units of 1024."""
    return {"k": 1, "m": 1024}[tokens[-1]] * int(tokens[:-1])


class Run:
    """One process, or a few that are compared: `work(out)` returns what is kept."""

    def __init__(self, name, work, seconds):
        self.name, self.work, self.seconds = name, work, seconds


class Pool:
    def __init__(self, args):
        self.apbd, self.out, self.gpus = args.apbd, args.out, args.gpus or gpus_there_are()
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="apbd-pool-"))
        self.counts = [n for n in (2, 4, 8) if n <= self.gpus]
        if not self.counts:
            sys.exit(f"pool.py: {self.gpus} GPU(s) here; at least 2 are needed")

    def call(self, *args, timeout, check=True, env=None):
        command = [str(self.apbd), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done

    # Parity: the fixture model, every strategy, on the CPU, on one GPU and on several.

    def forward(self, job, options, timeout=240):
        return json.loads(self.call("forward", "--model", FIXTURE, "--input", job, "--steps", 8, *options, timeout=timeout).stdout)

    def job(self, context, query):
        draw, vocab = random.Random(context), json.loads((FIXTURE / "config.json").read_text())["vocab_size"]
        path = self.scratch / f"job-{context}.json"
        path.write_text(json.dumps({key: [draw.randrange(vocab) for _ in range(n)] for key, n in (("context", context), ("query", query))}))
        return path

    def parity_of(self, options):
        job = self.job(3000, 40)
        expected = self.forward(job, [*options, "--backend", "cpu"])
        largest = max(map(abs, expected["last_logits"]))
        rows = []
        for ranks in [1, *self.counts]:
            got = self.forward(job, [*options, "--backend", "cuda", "--ranks", ranks])
            error = max(abs(a - b) for a, b in zip(got["last_logits"], expected["last_logits"], strict=True)) / largest
            same = sum(a == b for a, b in zip(got["greedy"], expected["greedy"], strict=True))
            rows.append({"what": "parity", "options": options, "gpus": ranks, "relative_error": round(error, 4), "same_tokens": same, "holds": error < 0.05})
        return rows

    def parity(self):
        paired = ["--attention", "apb", "--hosts", "8", "--anchor", "128", "--passing", "64", "--query-at", "16"]
        neighbours = ["--placement", "contiguous"]
        apb = [*paired, *neighbours]
        cases = {"full": ["--attention", "full"], "ring": ["--attention", "ring", "--hosts", "8", *neighbours], "ulysses": ["--attention", "ulysses", "--hosts", "8", *neighbours],
                 "star": ["--attention", "star", "--hosts", "8", *neighbours], "apb": apb, "apb-query-aware": [*apb, "--selector", "query-aware"],
                 "apb-paired": paired, "apb-no-overlap": [*apb, "--overlap", "off"], "apb-fp8": [*apb, "--passing-type", "fp8"],
                 "ring-paired": ["--attention", "ring", "--hosts", "16"]}
        return [Run(f"parity-{name}", lambda options=options: self.parity_of(options), 60) for name, options in cases.items()]

    # Twenty documents end to end: pieces of the fixture's documents, summarised on one GPU and on all.

    def documents_of(self):
        folder = self.scratch / "documents"
        folder.mkdir(exist_ok=True)
        files = [path.read_bytes() for path in sorted((ROOT / "fixtures/documents").iterdir()) if path.suffix in (".md", ".txt", ".html")]
        texts = [file.decode(errors="ignore") for file in files if b"\0" not in file]  # one is in UTF-16
        for i in range(20):
            text = texts[i % len(texts)]
            start = len(text) // 20 * (i // len(texts)) * 5
            (folder / f"part-{i:02}.txt").write_text(text[start:start + 60000])
        answers, rows = {}, []
        for ranks in (1, self.gpus):
            begin = time.monotonic()
            database = f"sqlite:{self.scratch}/documents-{ranks}.db"
            run = self.call("run", folder, "--backend", "cuda", "--ranks", ranks, "--db", database, "--format", "jsonl", timeout=400)
            answers[ranks] = {pathlib.Path(row["document"]).name: row for row in map(json.loads, run.stdout.splitlines())}
            rows.append({"what": "documents", "gpus": ranks, "documents": len(answers[ranks]), "seconds": round(time.monotonic() - begin, 1)})
        same = sum(row["text"] == answers[self.gpus].get(name, {}).get("text") for name, row in answers[1].items())
        rows[-1] |= {"same_text": same, "holds": len(answers[1]) == len(answers[self.gpus]) == 20}
        return rows

    def documents(self):
        return [Run("documents", self.documents_of, 120)]

    # Prefill, decode and shapes: `apbd bench`.

    def bench(self, what, *options, timeout):
        return json.loads(self.call("bench", what, "--format", "json", *options, timeout=timeout).stdout)

    def strategies(self, counts=None):
        """Name, options, GPUs, and roughly the seconds of attention over 128K of an 8B model, all GPUs together."""
        exact = 9
        yield "full-1", ["--attention", "full"], 1, exact
        for ranks in counts or self.counts:
            def on(attention, hosts, *more, placement="contiguous"):
                return ["--attention", attention, "--ranks", ranks, "--hosts", hosts, "--placement", placement, *more], ranks
            yield f"ring-{ranks}", *on("ring", ranks), 4 / 3 * exact
            yield f"ring-paired-{ranks}", *on("ring", 2 * ranks, placement="paired"), exact
            yield f"ulysses-{ranks}", *on("ulysses", ranks), exact
            yield f"star-{ranks}", *on("star", ranks), 4 * exact / ranks
            yield f"apb-{ranks}", *on("apb", ranks), 14 / ranks
            # More hosts than GPUs: the paper's eight, and two on each GPU that have as much to do as any other two.
            hosts = max(8, 2 * ranks)
            yield f"apb-hosts-{ranks}", *on("apb", hosts), 14 / hosts
            yield f"apb-hosts-no-overlap-{ranks}", *on("apb", hosts, "--overlap", "off"), 14 / hosts
            yield f"apb-paired-{ranks}", *on("apb", hosts, placement="paired"), 14 / hosts

    @staticmethod
    def expected(ranks, attention, tokens):
        """Seconds of one prefill of an 8B model, roughly: products, and attention over all or over a host's share."""
        share = thousands(tokens) / 128
        return (3.3 * share + attention * share**2) / ranks

    def prefill(self):
        runs = []
        for name, options, ranks, attention in self.strategies():
            work = lambda options=options: self.bench("prefill", "--tokens", ",".join(SHORT), "--repeats", 3, *options, timeout=240)
            runs.append(Run(f"prefill-{name}", work, 30 + 5 * sum(self.expected(ranks, attention, tokens) for tokens in SHORT)))
        return runs

    def long(self):
        """One run of each, cold: what warming up gains is lost in so many seconds. What takes more than eight minutes on so few GPUs is left out, and its file
        says so. Beside the paper's number of hosts, as many as make blocks of 32K."""
        runs = []
        for tokens in LONG:
            ranks, hosts = self.counts[-1], thousands(tokens) // 32
            options = ["--attention", "apb", "--ranks", ranks, "--hosts", hosts]
            blocks = [(f"apb-32k-blocks-{ranks}", options, ranks, 14 / 8)] if hosts > 8 else []
            for name, options, ranks, attention in [*self.strategies(self.counts[-1:]), *blocks]:
                if "no-overlap" in name:
                    continue
                seconds = 20 + 1.1 * self.expected(ranks, attention, tokens)
                def work(options=options, tokens=tokens, seconds=seconds):
                    if seconds > 480:
                        return [{"what": "left out", "options": list(map(str, options)), "tokens": tokens, "expected_seconds": round(seconds)}]
                    return self.bench("prefill", "--tokens", tokens, "--once", *options, timeout=max(120, 2 * seconds))
                runs.append(Run(f"long-{tokens}-{name}", work, seconds if seconds <= 480 else 1))
        return runs

    def shapes(self):
        runs = []
        for shape, size in (("qwen2.5-14b", 2), ("yi-34b", 4)):
            for name, options, ranks, attention in self.strategies(self.counts[-1:]):
                if "no-overlap" in name or name.startswith("ring-paired"):
                    continue
                work = lambda options=options, shape=shape: self.bench("prefill", "--shape", shape, "--tokens", "128k", "--repeats", 1, *options, timeout=400)
                runs.append(Run(f"shapes-{shape}-{name}", work, 30 + 3 * size * self.expected(ranks, attention, "128k")))
        return runs

    def decode(self):
        runs = []
        for ranks in [1, *self.counts]:
            options = ["--attention", "apb", "--hosts", 8, "--ranks", ranks, "--tokens", "4k,32k,128k"]
            runs.append(Run(f"decode-{ranks}", lambda options=options: self.bench("decode", *options, timeout=200), 40))
        return runs

    def peer(self):
        def work():
            command = [sys.executable, ROOT / "tests/bench/peer_gpu.py", "--tokens", "32768", "131072"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return [Run("peer-transformers", work, 150)]

    # An engine's process is killed in the middle of a prefill, and started again as its supervisor does.

    def kill(self):
        return [Run("kill-in-mid-prefill", self.killed, 120)]

    def killed(self):
        arguments = [str(self.apbd), "engine", "--model", str(FIXTURE), "--backend", "cuda", "--ranks", str(self.gpus)]
        first = Engine(arguments)
        healthy = first.infer(until=None)
        begin = time.monotonic()
        # The request is told to go on after this layer, and then there is nobody.
        layers = first.infer(until=2, then=lambda: os.kill(first.process.pid, signal.SIGKILL))
        first.process.wait()
        second = Engine(arguments)
        again = second.infer(until=None)
        seconds = time.monotonic() - begin
        second.close()
        return [{"what": "killed in mid-prefill", "gpus": self.gpus, "layers_done": layers, "exit": first.process.returncode, "start_seconds": round(second.start_seconds, 2),
                 "serving_again_seconds": round(seconds, 2), "same_tokens": again == healthy, "holds": again == healthy and seconds < 60}]


class Engine:
    """The engine's process and the socket that is its standard input: messages are JSON behind their length (4 bytes, little endian)."""

    def __init__(self, arguments):
        self.socket, theirs = socket.socketpair()
        begin = time.monotonic()
        self.process = subprocess.Popen(arguments, stdin=theirs, stdout=subprocess.DEVNULL)
        theirs.close()
        ready = self.hear()
        if ready.get("answer") != "ready":
            raise RuntimeError(f"the engine is not ready: {ready}")
        self.start_seconds = time.monotonic() - begin

    def say(self, message):
        data = json.dumps(message).encode()
        self.socket.sendall(struct.pack("<I", len(data)) + data)

    def hear(self):
        (length,) = struct.unpack("<I", self.exactly(4))
        return json.loads(self.exactly(length))

    def exactly(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError("the engine has gone")
            data += part
        return data

    def infer(self, until, then=lambda: None):
        """The tokens of a request; or how many layers were done when `then` was called, after `until` of them."""
        draw = random.Random(7)
        request = {"context": [draw.randrange(400) for _ in range(24000)], "query": [draw.randrange(400) for _ in range(40)], "query_at": 0,
                   "attention": {"mode": "apb", "hosts": 8}, "generation": {"max_new_tokens": 16, "temperature": 0.0}}
        self.say({"ask": "infer", "id": 1, "request": request})
        while True:
            answer = self.hear()
            if answer["answer"] == "done":
                return answer["result"]["Ok"]["tokens"]
            layers = answer.get("progress", {}).get("layers_done", 0)
            if until is not None and layers >= until:
                then()
                return layers

    def close(self):
        self.socket.close()
        self.process.wait(timeout=60)


def execute(pool, args):
    end = time.monotonic() + args.budget
    failed = 0
    for run in (run for part in args.parts for run in getattr(pool, part)() if re.search(args.only, run.name)):
        path = pool.out / f"{run.name}.json"
        if args.list:
            print(f"{run.name}  {run.seconds:.0f} s  {'done' if path.exists() else ''}")
            continue
        if path.exists():
            continue
        if time.monotonic() + run.seconds > end:
            print(f"{run.name}: left for later, it may take {run.seconds:.0f} s", flush=True)
            continue
        begin = time.monotonic()
        try:
            rows = run.work()
        except Exception as error:
            failed += 1
            print(f"{run.name}: FAILED after {time.monotonic() - begin:.0f} s: {error}", flush=True)
            continue
        path.write_text(json.dumps({"run": run.name, "gpus_of_machine": pool.gpus, "wall_seconds": round(time.monotonic() - begin, 1), "rows": rows}, indent=1) + "\n")
        broken = sum(row.get("holds") is False for row in rows)
        failed += broken
        print(f"{run.name}: {time.monotonic() - begin:.0f} s{f', {broken} DO NOT HOLD' if broken else ''}", flush=True)
    return failed


def summary(out):
    """Every figure in one file, one row a line."""
    rows = [row | {"run": kept["run"]} for path in sorted(out.glob("*.json")) if path.name != "summary.json" for kept in [json.loads(path.read_text())] for row in kept["rows"]]
    (out / "summary.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    for row in rows:
        if row.get("what") == "prefill":
            where = f"{row.get('gpus', 1)} GPUs, {row.get('hosts', '')} hosts {row.get('placement', '')}"
            print(f"{row.get('shape', 'transformers'):14} {row['attention']:16} {row['tokens']:8} {where:28} {row['seconds']:9.3f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "summary"])
    parser.add_argument("--apbd", type=pathlib.Path, default=ROOT / "target/release/apbd")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/bench/results/pool")
    parser.add_argument("--gpus", type=int, help="how many to use; by default all there are")
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    parser.add_argument("--only", default="", help="runs whose names hold this regular expression")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.parts == ["summary"]:
        return summary(args.out)
    args.parts = [part for part in args.parts if part != "summary"]
    pool = Pool(args)
    try:
        sys.exit(1 if execute(pool, args) else 0)
    finally:
        shutil.rmtree(pool.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
