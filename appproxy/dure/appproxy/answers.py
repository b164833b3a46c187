"""The proxy's own answers as they look to the client: JSON, or a small page for a browser."""

from __future__ import annotations

import html
import json
from http import HTTPStatus

from aiohttp import web

from dure.appproxy.admission import Refusal

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{status} {phrase}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:36em;padding:0 1em;color:#222}}
code{{color:#666}}</style>
<h1>{status} {phrase}</h1><p>{message}</p>
<p><code>{code}</code> &middot; request <code>{request_id}</code></p></html>
"""


def answer(refusal: Refusal, *, accept: str, request_id: str) -> web.Response:
    """The response of a refusal."""
    headers = [
        *refusal.headers,
        ("X-Request-Id", request_id),
        ("Server", "dure"),
        ("Cache-Control", "no-store"),
    ]
    if prefers_html(accept):
        body = _PAGE.format(
            status=refusal.status,
            phrase=HTTPStatus(refusal.status).phrase,
            message=html.escape(refusal.message),
            code=html.escape(refusal.code),
            request_id=html.escape(request_id),
        )
        content_type = "text/html; charset=utf-8"
    else:
        error = {"code": refusal.code, "message": refusal.message, "request_id": request_id}
        body = json.dumps({"error": error}, ensure_ascii=False) + "\n"
        content_type = "application/json"
    response = web.Response(
        status=refusal.status, body=body.encode(), headers=[*headers, ("Content-Type", content_type)]
    )
    if refusal.close:
        response.force_close()
    return response


def prefers_html(accept: str) -> bool:
    """Whether an Accept header asks for HTML rather than JSON; `*/*` alone does not."""
    quality = {"text/html": 0.0, "application/json": 0.0}
    for part in accept.split(","):
        media, *parameters = part.split(";")
        name = media.strip().lower()
        if name not in quality:
            continue
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        quality[name] = weight
    return quality["text/html"] > quality["application/json"]
