"""Counting, and Prometheus text."""

from __future__ import annotations

from dure.appproxy.meter import ABORTED, EndpointMeter, render, replica_finished


def test_text_is_cumulative_escaped_and_complete() -> None:
    meter = EndpointMeter("p", 'na"me\\\n')
    meter.finished(200, 0.02)
    meter.finished(503, 400)
    meter.finished(ABORTED, 0.001)
    meter.refused("starting")
    replica_finished(meter.replica("r"), 200)
    text = render({"e": meter}, 4, {"dure_proxy_x": 1.5})
    labels = 'project="p",endpoint="na\\"me\\\\\\n",endpoint_uid="e"'
    for line in (
        f'dure_proxy_requests_total{{{labels},class="2xx"}} 1',
        f'dure_proxy_requests_total{{{labels},class="5xx"}} 1',
        f'dure_proxy_requests_total{{{labels},class="aborted"}} 1',
        f'dure_proxy_refusals_total{{{labels},code="starting"}} 1',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="0.005"}} 1',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="0.025"}} 2',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="300.0"}} 2',
        f'dure_proxy_request_duration_seconds_bucket{{{labels},le="+Inf"}} 3',
        f"dure_proxy_request_duration_seconds_count{{{labels}}} 3",
        f'dure_proxy_replica_requests_total{{{labels},replica_uid="r",class="2xx"}} 1',
        "dure_proxy_unmatched_requests_total 4",
        "dure_proxy_x 1.5",
    ):
        assert line in text.split("\n")
    assert text.endswith("\n")


def test_replicas_that_left_are_forgotten_once_idle() -> None:
    meter = EndpointMeter("p", "e")
    meter.replica("busy").in_flight = 1
    meter.replica("idle")
    meter.replica("kept")
    meter.keep_replicas({"kept"})
    assert set(meter.replicas) == {"busy", "kept"}
