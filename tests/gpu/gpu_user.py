"""A program that uses a GPU of the stand-in, and serves HTTP on $PORT, with nothing but Python.

    gpu_user.py LEDGER BYTES [UTIL] [mps]

It uses the GPUs that CUDA_VISIBLE_DEVICES names, as long as it lives: BYTES of each, UTIL percent of the
time. GET /use?bytes=N makes it use N; any other path answers 200.
"""

import fcntl
import http.server
import os
import sys
import urllib.parse

ledger, used = sys.argv[1], int(sys.argv[2])
util = sys.argv[3] if len(sys.argv) > 3 else "0"
flag = sys.argv[4] if len(sys.argv) > 4 else ""
held = []


def use(amount: int) -> None:
    for file in held:
        # One write of one length: a reader never sees half of it.
        os.pwrite(file.fileno(), f"{amount} {util} {flag}".ljust(60).encode() + b"\n", 0)


for uuid in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
    os.makedirs(os.path.join(ledger, uuid), exist_ok=True)
    file = open(os.path.join(ledger, uuid, os.urandom(8).hex()), "wb")  # noqa: SIM115
    fcntl.lockf(file, fcntl.LOCK_EX)
    held.append(file)
use(used)
print("uses", used, "bytes of", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wanted = urllib.parse.urlsplit(self.path)
        if wanted.path == "/use":
            use(int(urllib.parse.parse_qs(wanted.query)["bytes"][0]))
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

    def log_message(self, *_: object) -> None:
        pass


http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ.get("PORT", "0"))), Handler).serve_forever()
