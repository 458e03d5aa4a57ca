"""An engine that speaks the daemon's protocol and does what a job's seed says, where the model does not matter.

seed 0: an answer at once · 1: the process dies · 2: silence · 3: a failed device · 4: an answer after `max_new_tokens` x 100 ms with signs of
progress · 5: dies if the file named by SCRIPT_FILE is not there yet, and makes it · 6: a model
that gives nothing usable · 8: as 4, with the signs of a prefill.
"""

import json
import os
import socket
import struct
import sys
import threading
import time

sock = socket.socket(fileno=0)
cancelled = threading.Event()


def read_exact(count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


def say(answer):
    text = json.dumps(answer).encode()
    sock.sendall(struct.pack("<I", len(text)) + text)


def plan(context, query):
    host = {"local": {"start": 0, "end": context}, "excluded": 0, "compressed": 0}
    return {"mode": "full", "context": context, "query": query, "hosts": [host], "anchor": None, "selector": {"kind": "none"}, "exact": True, "notes": []}


def infer(request):
    options = request["generation"]
    seed, tokens = options["seed"], options["max_new_tokens"]
    if seed == 1:
        os._exit(1)
    if seed == 2:
        time.sleep(3600)
    if seed == 3:
        return {"Err": {"error": "device", "reason": "scripted"}}
    if seed in (4, 8):
        for step in range(tokens):
            time.sleep(0.1)
            generated = {"stage": "generate", "tokens": step + 1, "at_most": tokens}
            read = {"stage": "prefill", "layers_done": step, "layers": tokens}
            say({"answer": "progress", "progress": generated if seed == 4 else read})
            if cancelled.is_set():
                return {"Err": {"error": "cancelled"}}
    if seed == 5 and not os.path.exists(os.environ["SCRIPT_FILE"]):
        open(os.environ["SCRIPT_FILE"], "w").close()
        os._exit(1)
    if seed == 6:
        return {"Err": {"error": "model", "reason": "scripted"}}
    zero = {"secs": 0, "nanos": 0}
    outcome = {"tokens": [1, 2], "text": f"read {len(request['context'])}", "stop": "end_of_text", "prefill": zero, "generate": zero}
    outcome["plan"] = plan(len(request["context"]), len(request["query"]))
    return {"Ok": outcome}


def work(ask):
    cancelled.clear()
    say({"answer": "done", "result": infer(ask["request"])})


def main():
    info = {"model": "scripted", "model_digest": "scripted", "max_tokens": 1_000_000, "has_retaining_heads": False, "device": "none"}
    say({"answer": "ready", "info": info})
    while True:
        (length,) = struct.unpack("<I", read_exact(4))
        ask = json.loads(read_exact(length))
        if ask["ask"] == "cancel":
            cancelled.set()
        elif ask["ask"] == "infer":
            threading.Thread(target=work, args=(ask,), daemon=True).start()


sys.exit(main())
