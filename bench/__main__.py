"""`python -m bench [NAME ...]`: runs all benchmarks, or those named."""

from __future__ import annotations

import sys

from bench import containers, firing, forwarding, llama, measuring, readiness, scaling, stepload, waking

BENCHMARKS = {
    "readiness": readiness.main,
    "forwarding": forwarding.main,
    "measuring": measuring.main,
    "containers": containers.main,
    "scaling": scaling.main,
    "firing": firing.main,
    "waking": waking.main,
    "stepload": stepload.main,
    "llama": llama.main,
}


def run() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise SystemExit(f"no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    for name in names:
        BENCHMARKS[name]()


run()
