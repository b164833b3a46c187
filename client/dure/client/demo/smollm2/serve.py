"""Serves a GGUF file with llama.cpp's OpenAI-compatible server, from the wheel `xllamacpp`."""

import argparse
import os
import signal
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="the GGUF file (default: $MODEL)")
    parser.add_argument("--port", type=int, default=os.environ.get("PORT"), help="port (default: $PORT)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; requests there need no token"
    )
    parser.add_argument("--alias", default="smollm2", help="the model's name in /v1/models")
    arguments = parser.parse_args()
    if arguments.model is None or arguments.port is None:
        parser.error("--model and --port are required (or set MODEL and PORT)")
    if not os.path.isfile(arguments.model):
        sys.exit(f"serve.py: no file {arguments.model}: upload the GGUF file to the model folder")
    try:
        import xllamacpp
    except ImportError as error:
        sys.exit(
            f"serve.py: {error}: install it where the agent runs, with `pip install 'dure[demo]'` "
            f"(this is {sys.executable})"
        )

    # The default action ends the process at once, while the model is still loading, too.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.model_alias = {arguments.alias}
    params.hostnames = [arguments.host]
    params.port = arguments.port
    # n_parallel divides n_ctx: four conversations of 1,024 tokens each.
    params.n_ctx = 4096
    params.n_parallel = 4
    # With the default number a handful of idle keep-alive connections starve /health for 5 to 10 s.
    params.n_threads_http = 64
    params.cpuparams.n_threads = 1
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(f"serving {arguments.model} at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
