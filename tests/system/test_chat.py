"""Tokens and chats against a whole cluster: the real manager, agent and proxy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from system.cluster import DURE, Cluster, cluster, until
from system.test_main_job import answer

# Speaks the API of OpenAI as far as a chat needs it, in pieces, and tells how often it was asked.
MODEL = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        known = self.path in ("/health", "/v1/models")
        self.whole(200 if known else 404, {"object": "list", "data": [{"id": "parrot", "object": "model"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert "Authorization" not in self.headers
        said = [m["content"] for m in asked["messages"] if m["role"] == "user"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in f"{len(said)}: {said[-1]}".split():
            self.event({"choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]})
            time.sleep(0.05)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.chunk(b"data: [DONE]\\n\\n")
        self.chunk(b"")
    def event(self, content):
        self.chunk(b"data: " + json.dumps(content).encode() + b"\\n\\n")
    def chunk(self, data):
        self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(data), data))
    def whole(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _tokens(dure: Cluster, endpoint: str) -> list[tuple[str, str]]:
    listed = json.loads(dure.dure("token", "list", endpoint, "-o", "json"))["tokens"]
    return [(token["label"], token["status"]) for token in listed]


def test_a_chat_and_tokens_that_end(tmp_path: Path) -> None:
    with cluster(tmp_path / "d") as dure:
        dure.model(server=MODEL)
        endpoint = dure.serve("parrot", 1)
        address = endpoint["address"]

        # A private endpoint: the chat makes a token, streams through the proxy, and revokes it.
        done = subprocess.run(
            [*DURE, "chat", "parrot", "-v"],
            env=dure.environ,
            input=b"Polly wants a cracker",
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().split() == ["1:", "Polly", "wants", "a", "cracker"]
        assert b"parrot: 5 pieces in" in done.stderr
        assert _tokens(dure, "parrot") == [("dure chat", "REVOKED")]

        # By its address and a token, as any other server; without one it says how to get it.
        secret = dure.dure("token", "create", "parrot", "--expires", "1h", "--label", "ci", "-q").strip()
        for url in (address, f"{address.rstrip('/')}/v1"):
            said = dure.dure("chat", "--base-url", url, "--token", secret, "-m", "hello")
            assert said.split() == ["1:", "hello"]
        denied = dure.dure("chat", "--base-url", address, "-m", "hello", code=4)
        assert "this endpoint needs a token" in denied and "dure token create" in denied

        # Revoked by its label; shown again all the same.
        models = f"{address.rstrip('/')}/v1/models"
        assert answer(models, secret)[0] == 200
        dure.dure("token", "revoke", "parrot", "ci")
        until(lambda: answer(models, secret) == (401, "token_revoked"), 1.0, "the revocation binds")
        assert dure.dure("token", "get", "parrot", "ci", "-q").strip() == secret
        short = dure.dure("token", "create", "parrot", "--expires", "3s", "-q").strip()
        assert answer(models, short)[0] == 200
        until(lambda: answer(models, short) == (401, "token_expired"), 4.0, "it ends within a second")

        # Revoked while the only proxy is dead; it starts from its disk, and hears of it with the table.
        away = dure.dure("token", "create", "parrot", "--expires", "1h", "--label", "away", "-q").strip()
        assert answer(models, away)[0] == 200
        dure.kill("proxy-1")
        dure.dure("token", "revoke", "parrot", "away")
        dure.start("proxy")
        until(lambda: _alive(models), 20, "the proxy is back")
        dure.dure("doctor", "--wait", "20")  # its stream is up
        until(lambda: answer(models, away) == (401, "token_revoked"), 1.0, "the revocation binds")
        # And the manager started anew: what was revoked stays so, what works goes on.
        fresh = dure.dure("token", "create", "parrot", "--expires", "1h", "-q").strip()
        dure.kill("manager")
        assert answer(models, fresh)[0] == 200
        dure.start("manager")
        dure.dure("doctor", "--wait", "30")
        for token, code in ((away, "token_revoked"), (secret, "token_revoked"), (short, "token_expired")):
            assert answer(models, token) == (401, code)
        assert answer(models, fresh)[0] == 200

        dure.dure("endpoint", "scale", "parrot", "0", "--wait", "--timeout", "30")
        assert "zero replicas are wanted" in dure.dure("chat", "parrot", "-m", "x", code=1)


def _alive(url: str) -> bool:
    try:
        return answer(url)[0] == 401
    except OSError:
        return False
