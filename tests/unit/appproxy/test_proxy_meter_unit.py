"""Counting, and Prometheus text."""

from __future__ import annotations

import re

from dure.appproxy.exhibit import ENDPOINTS_MAX, render
from dure.appproxy.meter import ABORTED, EndpointMeter, replica_finished


def test_text_is_cumulative_escaped_and_complete() -> None:
    meter = EndpointMeter("p", 'na"me\\\n')
    meter.finished(200, 0.02)
    meter.finished(504, 400)
    meter.finished(ABORTED, 0.001)
    meter.finished(101, 3600)
    meter.began(0.004)
    meter.refused(503, "starting", admitted=True)
    meter.refused(401, "token_missing", admitted=False)
    meter.held = 3
    replica_finished(meter.replica("r"), 200)
    meter.replica("r").ejections = 2
    text = "".join(render({"e": meter}, {"dure_proxy_x_total": 4}, {"dure_proxy_x": 1.5}))
    labels = 'project="p",endpoint="na\\"me\\\\\\n",endpoint_uid="e"'
    for line in (
        f'dure_proxy_requests_total{{{labels},class="1xx"}} 1',
        f'dure_proxy_requests_total{{{labels},class="2xx"}} 1',
        f'dure_proxy_requests_total{{{labels},class="4xx"}} 1',
        f'dure_proxy_requests_total{{{labels},class="5xx"}} 2',
        f'dure_proxy_requests_total{{{labels},class="aborted"}} 1',
        f'dure_proxy_refusals_total{{{labels},code="starting"}} 1',
        f"dure_proxy_held_requests{{{labels}}} 3",
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="0.001"}} 1',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="0.02"}} 2',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="300"}} 2',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="+Inf"}} 3',
        f"dure_proxy_request_duration_seconds_count{{{labels}}} 3",
        f'dure_proxy_first_byte_seconds_bucket{{{labels},le="0.002"}} 0',
        f'dure_proxy_first_byte_seconds_bucket{{{labels},le="0.005"}} 1',
        f'dure_proxy_replica_requests_total{{{labels},replica_uid="r",class="2xx"}} 1',
        f'dure_proxy_replica_ejections_total{{{labels},replica_uid="r"}} 2',
        "dure_proxy_x_total 4",
        "dure_proxy_x 1.500000",
    ):
        assert line in text.split("\n")
    assert text.endswith("\n")


def test_endpoints_beyond_the_bound_are_summed_up_as_other() -> None:
    meters = {f"e{number}": EndpointMeter("p", f"n{number}") for number in range(ENDPOINTS_MAX + 5)}
    meters["e1004"].arrived = 7  # the busiest is shown by itself, wherever it stands
    for uid in ("e999", "e1000", "e1003"):
        meters[uid].finished(200, 0.03)
        meters[uid].refused(503, "starting", admitted=True)
        meters[uid].in_flight = 2
    text = "".join(render(meters, {}, {}))
    shown = re.findall(r"^dure_proxy_in_flight_requests{.*endpoint_uid=\"(.*)\"} (\d+)$", text, re.MULTILINE)
    assert len(shown) == ENDPOINTS_MAX + 1
    assert shown[0][0] == "e1004"
    assert dict(shown)["other"] == "6"
    other = 'project="other",endpoint="other",endpoint_uid="other"'
    assert f'dure_proxy_requests_total{{{other},class="5xx"}} 3' in text
    assert f'dure_proxy_request_duration_seconds_bucket{{{other},le="0.035"}} 3' in text
    assert f"dure_proxy_request_duration_seconds_sum{{{other}}} 0.090000" in text


def test_no_piece_cuts_a_histogram() -> None:
    meters = {f"e{number}": EndpointMeter("p", f"n{number}") for number in range(3)}
    pieces = [piece for piece in render(meters, {}, {}) if "duration_seconds_bucket" in piece]
    assert len(pieces) == 3
    assert all("duration_seconds_count" in piece and piece.endswith("\n") for piece in pieces)


def test_replicas_that_left_are_forgotten_once_idle() -> None:
    meter = EndpointMeter("p", "e")
    meter.replica("busy").in_flight = 1
    meter.replica("idle")
    meter.replica("kept")
    meter.keep_replicas({"kept"})
    assert set(meter.replicas) == {"busy", "kept"}
