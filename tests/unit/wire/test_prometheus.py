"""The text at /metrics."""

import math

from dure.wire.prometheus import LABEL_SETS_MAX, Counter, Histogram, Histograms, Page, number


def test_a_page() -> None:
    page = Page()
    page.gauges("g", "Things", [({"name": 'a "b"\\\n'}, 1.5), ({}, 2)])
    page.total("t_total", "All", 3)
    calls = Counter(("method", "code"))
    calls.add("Get", "OK")
    calls.add("Get", "OK")
    page.counter("calls_total", "Calls", calls)
    durations = Histograms(("method",), (0.1, 1.0))
    for value in (0.1, 0.5, 7):
        durations.observe(value, "Get")
    page.histograms("d_seconds", "Durations", durations)
    assert page.render() == (
        "# HELP g Things.\n# TYPE g gauge\n"
        'g{name="a \\"b\\"\\\\\\n"} 1.5\ng 2\n'
        "# HELP t_total All.\n# TYPE t_total counter\nt_total 3\n"
        '# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total{method="Get",code="OK"} 2\n'
        "# HELP d_seconds Durations.\n# TYPE d_seconds histogram\n"
        'd_seconds_bucket{method="Get",le="0.1"} 1\n'
        'd_seconds_bucket{method="Get",le="1"} 2\n'
        'd_seconds_bucket{method="Get",le="+Inf"} 3\n'
        'd_seconds_sum{method="Get"} 7.6\nd_seconds_count{method="Get"} 3\n'
    )


def test_label_sets_are_bounded() -> None:
    counter, histograms = Counter(("a", "b")), Histograms(("a",))
    for index in range(LABEL_SETS_MAX + 50):
        counter.add(str(index), "x")
        histograms.observe(1.0, str(index))
    assert len(counter.counts) == len(histograms.found) == LABEL_SETS_MAX + 1
    assert counter.counts["other", "other"] == 50
    assert sum(histograms.found["other",].counts) == 50


def test_values_on_a_bound_belong_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 2.0, 2.1):
        histogram.observe(value)
    assert histogram.counts == [1, 1, 1]


def test_numbers() -> None:
    shown = [number(value) for value in (0, 1.0, 0.1, 2**40, 1e300, math.inf, -math.inf, math.nan, True)]
    assert shown == ["0", "1", "0.1", "1099511627776", "1e+300", "+Inf", "-Inf", "NaN", "1"]
