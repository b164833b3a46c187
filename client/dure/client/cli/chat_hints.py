"""What to try next when `dure chat` does not get an answer, by the reason of the error."""

from __future__ import annotations

NEXT = {
    "CHAT_TOKEN": "for an endpoint of Dure, `dure token create ENDPOINT --expires 1h -q` prints a token and "
    "--token takes it; another server has keys of its own",
    "CHAT_NO_MODELS": "if it is a language model, name it with --model ID; other services take `curl`",
    "CHAT_NO_SUCH_MODEL": "--model ID names another; /model in a chat shows what there is",
    "CHAT_NOT_COMPATIBLE": "--base-url takes the URL of an OpenAI-compatible API with its version, such as "
    "http://HOST:PORT/v1; for other services there is `curl`",
    "CHAT_UNREACHABLE": "check host and port; `dure endpoint get NAME` shows an endpoint's address",
    "CHAT_TIMED_OUT": "`dure endpoint get NAME` says how an endpoint is; its log says what the model does",
    "CHAT_MOVED": "give the new place with --base-url",
    "CHAT_BUSY": "ask again in a moment; `dure endpoint get NAME` says how an endpoint is",
    "CHAT_REFUSED": "if the conversation has become too long, /clear begins another",
    "CHAT_STOPPED": "`dure endpoint scale NAME 1 --wait` starts it",
    "CHAT_NO_ENDPOINT": "`dure endpoint list` shows the endpoints",
    "CHAT_BROKEN_OFF": "ask again; `dure endpoint events NAME` says whether a replica failed",
    "CHAT_FAILED": "ask again; the log of the model server says more",
    "CHAT_EMPTY": "ask again, or with a larger --max-tokens",
}
