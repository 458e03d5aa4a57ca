"""An engine that speaks the daemon's protocol and does what a job's seed says, where the model does not matter.

seed 0: an answer at once · 1: the process dies, a tenth of a second later if other requests are in it · 2: silence of the whole process · 3: a failed device · 4: an answer after `max_new_tokens` x 100 ms with signs of progress · 5: dies if the file named by
SCRIPT_FILE is not there yet, and makes it · 6: a model that gives nothing usable · 7: this request alone stands still, and ends when it is
cancelled · 8: as 4, with the signs of a prefill · 9: as 7, and does not listen.

A request needs a byte of memory for every token of its context; an engine that is brought more than it has ends.

Usage: scripted_engine.py [CONCURRENCY [MEMORY_BYTES]]
"""

import json
import os
import socket
import struct
import sys
import threading
import time

CONCURRENCY = int(sys.argv[1]) if len(sys.argv) > 1 else 1
MEMORY = int(sys.argv[2]) if len(sys.argv) > 2 else None

sock = socket.socket(fileno=0)
saying = threading.Lock()
cancelled = {}
needed = {}
silent = threading.Event()


def read_exact(count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


def say(answer):
    if silent.is_set():
        time.sleep(3600)
    text = json.dumps(answer).encode()
    with saying:
        sock.sendall(struct.pack("<I", len(text)) + text)


def plan(context, query):
    host = {"local": {"start": 0, "end": context}, "excluded": 0, "compressed": 0}
    return {"mode": "full", "context": context, "query": query, "hosts": [host], "anchor": None, "selector": {"kind": "none"}, "exact": True, "notes": []}


def infer(id, request):
    options = request["generation"]
    seed, tokens = options["seed"], options["max_new_tokens"]
    say({"answer": "progress", "id": id, "progress": {"stage": "prefill", "layers_done": 0, "layers": 1}})
    if seed == 1:
        time.sleep(0.1 if len(cancelled) > 1 else 0)
        os._exit(1)
    if seed == 2:
        silent.set()
        time.sleep(3600)
    if seed == 3:
        return {"Err": {"error": "device", "reason": "scripted"}}
    if seed in (4, 8):
        for step in range(tokens):
            time.sleep(0.1)
            generated = {"stage": "generate", "tokens": step + 1, "at_most": tokens}
            read = {"stage": "prefill", "layers_done": step, "layers": tokens}
            say({"answer": "progress", "id": id, "progress": generated if seed == 4 else read})
            if cancelled[id].is_set():
                return {"Err": {"error": "cancelled"}}
    if seed == 5 and not os.path.exists(os.environ["SCRIPT_FILE"]):
        open(os.environ["SCRIPT_FILE"], "w").close()
        os._exit(1)
    if seed == 6:
        return {"Err": {"error": "model", "reason": "scripted"}}
    if seed == 7:
        cancelled[id].wait()
        return {"Err": {"error": "cancelled"}}
    if seed == 9:
        time.sleep(3600)
    zero = {"secs": 0, "nanos": 0}
    outcome = {"tokens": [1, 2], "text": f"read {len(request['context'])}", "stop": "end_of_text", "prefill": zero, "generate": zero}
    outcome["plan"] = plan(len(request["context"]), len(request["query"]))
    return {"Ok": outcome}


def work(id, request):
    result = infer(id, request)
    del cancelled[id], needed[id]
    say({"answer": "done", "id": id, "result": result})


def main():
    info = {"model": "scripted", "model_digest": "scripted", "max_tokens": 1_000_000, "has_retaining_heads": False, "concurrency": CONCURRENCY, "device": "none"}
    say({"answer": "ready", "info": info})
    while True:
        (length,) = struct.unpack("<I", read_exact(4))
        ask = json.loads(read_exact(length))
        id = ask["id"]
        if ask["ask"] == "cancel":
            if id in cancelled:
                cancelled[id].set()
        elif ask["ask"] == "plan":
            demand = MEMORY and {"kept_bytes": ask["context"], "transient_bytes": 0, "available_bytes": MEMORY}
            say({"answer": "planned", "id": id, "result": {"Ok": plan(ask["context"], ask["query"])}, "demand": demand})
        elif ask["ask"] == "infer":
            cancelled[id], needed[id] = threading.Event(), len(ask["request"]["context"])
            if MEMORY and sum(needed.values()) > MEMORY or len(needed) > CONCURRENCY:
                os._exit(3)
            threading.Thread(target=work, args=(id, ask["request"]), daemon=True).start()


sys.exit(main())
