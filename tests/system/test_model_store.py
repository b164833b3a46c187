"""From two definition files to an answer: checked, listed, run; and a runtime that is data."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from system.cluster import cluster

DEFINITION = """
models:
  - name: five-actions
    model_path: /models
    service:
      pre_start_actions:
        - {action: mkdir, args: {path: /home/work/site}}
        - {action: write_file, args: {filename: /home/work/site/a, body: [one], mode: 600}}
        - {action: write_file, args: {filename: /home/work/site/a, body: "two\\n", append: True}}
        - {action: write_tempfile, ref: script, args: {body: "print(*open('/home/work/site/a'), sep='')"}}
        - {action: run_command, ref: said, args: {command: [python, "{script}"]}}
        - {action: log, args: {message: "said {said.out}", debug: True}}
      start_command: |
        echo '{said} {"json": {}} {model_path}' > /home/work/site/index.html
        env | grep ^MODE= >> /home/work/site/index.html
        exec python -m http.server --directory /home/work/site {port}
      port: 8000
      health_check: {path: /a, interval: 0.3, initial_delay: 0}
    metadata: {title: Five actions, task: demo}
"""
SERVICE = """
[custom.environment]
image = "example.com/any:latest"
architecture = "x86_64"
[custom.resource_slots]
cpu = 0.2
mem = "128m"
[custom.environ]
MODE = "from the file"
[noted.environment]
image = "example.com/any:latest"
architecture = "x86_64"
"""
RUNTIME = """
title: Noted
start_command: {args: [python, -u, "{model_path}/echo.py", "{port}"]}
port: 8000
health_check: {path: /, interval_s: 0.3, initial_delay_s: 0}
resource_slots: {cpu: "0.2", mem: 128m}
flags:
- {variable: NOTED_SIZE, flag: --size}
- {variable: NOTED_EXTRA}
"""
ECHO = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(sys.argv[2:]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"""


def fetch(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as response:
        text: str = response.read().decode()
        return text


def test_a_model_runs_from_its_files_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model-definition.yaml").write_text(DEFINITION.replace("port: 8000", 'prot: "8000"'))
    (source / "service-definition.toml").write_text(SERVICE)
    (source / "echo.py").write_text(ECHO)
    with cluster(tmp_path / "d") as dure:
        dure.dure("folder", "create", "Five_Actions", "--usage", "model")
        dure.dure("folder", "upload", "Five_Actions", str(source))
        dure.dure("folder", "check", f"{source}/", code=1)
        dure.dure("folder", "check", "Five_Actions", code=1)
        refused = dure.dure("model", "run", "Five_Actions", code=1)
        assert "models[0].service.prot: unknown key; did you mean `port`?" in refused
        assert "unknown runtime `noted`" in refused

        (tmp_path / "noted.yaml").write_text(RUNTIME)
        dure.dure("runtime", "create", "noted", "-f", str(tmp_path / "noted.yaml"))
        (source / "model-definition.yaml").write_text(DEFINITION)
        dure.dure("folder", "upload", "Five_Actions", str(source))
        dure.dure("folder", "check", "Five_Actions")
        (listed,) = json.loads(dure.dure("model", "list", "-o", "json"))["models"]
        assert (listed["metadata"]["title"], listed["runnable"]) == ("Five actions", True)
        dure.dure("model", "run", "Five_Actions", "--wait", "--timeout", "60")
        endpoint = dure.get("five-actions")
        assert (endpoint["status"], endpoint["resolved"]["environ"]) == ("HEALTHY", {"MODE": "from the file"})
        dure.dure("endpoint", "update", "five-actions", "--public")
        page = fetch(endpoint["address"])
        assert page.startswith('one\ntwo {"json": {}} /')
        assert page.endswith("MODE=from the file\n")

        noted = ("--runtime", "noted", "-e", "NOTED_SIZE=2", "-e", "NOTED_EXTRA=--a 'b c'", "--public")
        dure.dure("endpoint", "create", "n", "--model", "Five_Actions", *noted, "--wait", "--timeout", "60")
        assert json.loads(fetch(dure.get("n")["address"])) == ["--size", "2", "--a", "b c"]
