"""Metrics pages, whole, broken and hostile."""

from __future__ import annotations

import math
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dure.appproxy import exposition
from dure.appproxy.exposition import Buckets, Memory, PageRefused, Reader, read

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{finished_reason="stop"} 10.0
vllm:request_success_total{finished_reason="length"} 2.0
# TYPE vllm:request_success_created gauge
vllm:request_success_created{finished_reason="stop"} 1.7e+09
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5"} 2.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 3.0
vllm:time_to_first_token_seconds_count{engine="0"} 3.0
vllm:time_to_first_token_seconds_sum{engine="0"} 1.25
vllm:time_to_first_token_seconds_bucket{le="0.1",engine="1"} 10.0
vllm:time_to_first_token_seconds_bucket{le="0.5",engine="1"} 20.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",engine="1"} 30.0
# TYPE vllm:time_to_first_token_seconds_created gauge
vllm:time_to_first_token_seconds_created{engine="0"} 1.7e+09
"""
OPENMETRICS = """\
# TYPE requests counter
# UNIT requests requests
requests_total{path="/a"} 5.0 1520879607.789 # {trace_id="KOO5S4vxi0o"} 0.67 1520879607.7
requests_total{path="/b\\"}, x=\\""} 6.0
requests_created{path="/a"} 1520430000.123
# TYPE size summary
size{quantile="0.99"} 17
size_count 3
size_sum 324789.3
# TYPE build info
build_info{version="1"} 1
# TYPE mode stateset
mode{mode="fast"} 1
# TYPE ages gaugehistogram
ages_bucket{le="+Inf"} 4
ages_gcount 4
ages_gsum 9
# TYPE temperature unknown
temperature -3.5
# EOF
ignored_after_the_end 1
"""


def test_what_vllm_shows() -> None:
    found = read(VLLM.encode())
    assert found.gauges == {"vllm:num_requests_running": 7.0}
    assert found.counters == {
        "vllm:request_success_total": 12.0,
        "vllm:time_to_first_token_seconds_count": 3.0,
        "vllm:time_to_first_token_seconds_sum": 1.25,
    }
    assert found.histograms == {
        "vllm:time_to_first_token_seconds": Buckets((0.1, 0.5, math.inf), (11.0, 22.0, 33.0))
    }
    assert found.broken == 0


def test_openmetrics() -> None:
    found = read(OPENMETRICS.encode())
    assert found.gauges == {"temperature": -3.5}
    assert found.counters == {"requests_total": 11.0, "size_count": 3.0, "size_sum": 324789.3}
    assert (found.histograms, found.broken) == ({}, 0)


def test_what_llama_cpp_shows_with_windows_line_ends_and_no_last_one() -> None:
    page = b"# TYPE llamacpp:requests_processing gauge\r\nllamacpp:requests_processing 2\r\nllamacpp:x 1"
    assert read(page).gauges == {"llamacpp:requests_processing": 2.0, "llamacpp:x": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        b"no_value", b"a b c", b"1a 2", b'a{b="c} 1', b"a{b=c} 1", b'a{b="c"', b"a{} ", b"a 1_000", b"a 0x1",
        b"\xff\xfe 1", b"a" * 17_000 + b" 1", b'{"quoted.name"} 1', b"<html>", b"a 1 2 3", b"a 1e", b"a --1",
    ],
)  # fmt: skip
def test_a_line_that_is_no_sample_is_counted_and_the_rest_is_read(line: bytes) -> None:
    found = read(b"before 1\n" + line + b"\nafter 2\n")
    assert found.gauges == {"before": 1.0, "after": 2.0}
    assert found.broken == 1


@pytest.mark.parametrize("value", ["NaN", "nan", "+Inf", "-Inf", "inf", "1e999", "-1e999"])
def test_what_is_no_finite_number_is_left_out(value: str) -> None:
    found = read(f"a {value}\nb 1\n".encode())
    assert (found.gauges, found.broken) == ({"b": 1.0}, 0)


@pytest.mark.parametrize(
    "buckets",
    [
        [("1", 5), ("2", 6)],  # no infinite bound
        [("1", 5), ("2", 4), ("+Inf", 6)],  # falls
        [("1", -5), ("+Inf", 6)],
    ],
)
def test_a_histogram_that_is_none_is_left_out(buckets: list[tuple[str, int]]) -> None:
    lines = [f'h_bucket{{le="{bound}"}} {count}' for bound, count in buckets]
    found = read("\n".join(["# TYPE h histogram", *lines, "h_count 6"]).encode())
    assert (found.histograms, found.counters) == ({}, {"h_count": 6.0})


def test_a_bucket_without_a_bound_is_broken() -> None:
    found = read(b'# TYPE h histogram\nh_bucket{a="1"} 1\nh_bucket 2\nh_bucket{le="x"} 2\nok 1\n')
    assert (found.histograms, found.broken) == ({}, 3)


def test_many_buckets_are_thinned_and_stay_true() -> None:
    lines = [f'h_bucket{{le="{bound}"}} {bound * 2}' for bound in range(1000)]
    page = "\n".join(["# TYPE h histogram", *lines, 'h_bucket{le="+Inf"} 5000'])
    buckets = read(page.encode()).histograms["h"]
    assert len(buckets.bounds) <= exposition.BUCKETS_MAX
    assert buckets.bounds[-1] == math.inf and buckets.counts[-1] == 5000
    assert all(
        count == bound * 2 for bound, count in zip(buckets.bounds[:-1], buckets.counts[:-1], strict=True)
    )


def test_known_names_come_first_when_there_are_too_many() -> None:
    lines = [f"a{number:04} 1" for number in range(1000)] + ["vllm:x 1", "tgi_queue_size 2", "sglang:y 3"]
    found = read("\n".join(lines).encode())
    assert len(found.gauges) == exposition.FAMILIES_MAX
    assert {"vllm:x", "tgi_queue_size", "sglang:y", "a0000"} <= found.gauges.keys()
    assert "a0999" not in found.gauges


def test_histograms_have_a_bound_of_their_own() -> None:
    lines = [f'# TYPE h{n} histogram\nh{n}_bucket{{le="+Inf"}} 1\nh{n}_count 1' for n in range(1000)]
    found = read("\n".join(lines).encode())
    assert len(found.histograms) == exposition.HISTOGRAMS_MAX
    assert len(found.histograms) + len(found.counters) == exposition.FAMILIES_MAX


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b"a 1\n" * (exposition.SAMPLES_MAX + 1), "samples"),
        (b"x" * (exposition.PAGE_BYTES_MAX + 1), "larger"),
        (b"<html><body>hello</body></html>\n", "no line"),
    ],
)
def test_pages_that_are_refused(page: bytes, said: str) -> None:
    with pytest.raises(PageRefused, match=said):
        read(page)


def test_an_empty_page_shows_nothing() -> None:
    assert read(b"") == exposition.Metrics()


def test_a_line_that_never_ends_costs_no_memory_and_little_time() -> None:
    reader = Reader()
    began_s = time.process_time()
    for _ in range(exposition.PAGE_BYTES_MAX // 1024):
        reader.feed(b"x" * 1024)
        assert len(reader._rest) < 20_000
    assert time.process_time() - began_s < 1
    with pytest.raises(PageRefused):
        reader.end()


_HOSTILE = [
    "a{" + 'b="c",' * 2600 + "!",
    "a{" + 'b="' + "\\" * 15_000,
    "a{" + " " * 15_000 + "!",
    "a" + " " * 15_000 + "!",
    "a 1" + " " * 15_000 + "!",
    "a " + "1" * 15_000 + "!",
    'a{b="' + '\\"' * 7_000,
]


@pytest.mark.parametrize("line", _HOSTILE)
def test_no_line_takes_long(line: str) -> None:
    began_s = time.process_time()
    for _ in range(50):
        with pytest.raises(PageRefused):
            read(line.encode())
    assert time.process_time() - began_s < 0.5


@given(st.binary(max_size=400) | st.text(alphabet='abc_:{}="\\,# \n\tTYPE0.1e+-NaIinf', max_size=400))
@settings(max_examples=400)
def test_no_page_breaks_it(page: bytes | str) -> None:
    data = page if isinstance(page, bytes) else page.encode()
    try:
        found = read(data)
    except PageRefused:
        return
    assert all(math.isfinite(value) for value in (*found.gauges.values(), *found.counters.values()))
    for buckets in found.histograms.values():
        assert list(buckets.counts) == sorted(buckets.counts)


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=20))
def test_pieces_make_no_difference(tail: bytes, sizes: list[int]) -> None:
    page = VLLM.encode() + tail
    reader, rest = Reader(), page
    for size in sizes:
        reader.feed(rest[:size])
        rest = rest[size:]
    reader.feed(rest)
    assert reader.end() == read(page)


_series = [
    "a",
    'a{x="1"}',
    'a_bucket{le="1"}',
    'a_bucket{le="+Inf"}',
    "a_count",
    "a_total",
    "a_created",
    "a_bucket",
]
_lines = st.one_of(
    st.sampled_from(["counter", "gauge", "histogram", "summary", "info", "odd"]).map(
        lambda t: f"# TYPE a {t}"
    ),
    st.tuples(
        st.sampled_from(_series),
        st.sampled_from([" ", "  ", "\t", " \t"]),
        st.sampled_from(["1", "2.5", "NaN", "1e400", "1_0", "x", "3 4", "3 # {} 4", "5 ", "6\r", "7e307"]),
    ).map("".join),
    st.text(alphabet='a_{}le="1 #', max_size=12),
)


@given(st.lists(st.lists(_lines, max_size=12), min_size=1, max_size=6))
@settings(max_examples=300)
def test_what_is_remembered_of_other_pages_makes_no_difference(pages: list[list[str]]) -> None:
    memory = Memory()
    for lines in pages:
        page = "\n".join(lines).encode()
        results: list[exposition.Metrics | str] = []
        for reader in (Reader(memory), Reader()):
            reader.feed(page)
            try:
                results.append(reader.end())
            except PageRefused as refused:
                results.append(str(refused))
        assert results[0] == results[1]


def test_what_is_remembered_is_bounded() -> None:
    memory = Memory()
    for number in range(exposition.SERIES_REMEMBERED_MAX + 10):
        memory.add(b"a%d" % number, "a", None)
    memory.add(b"x" * 1000, "x", None)
    assert len(memory.series) == 10


def test_sums_that_overflow_are_left_out() -> None:
    found = read(
        b'a{x="1"} 1e308\na{x="2"} 1e308\nb 1\n# TYPE h histogram\n'
        b'h_bucket{le="+Inf",x="1"} 1e308\nh_bucket{le="+Inf",x="2"} 1e308\n'
    )
    assert (found.gauges, found.histograms) == ({"b": 1.0}, {})


_names = st.from_regex(r"[a-z_:][a-z0-9_:]{0,8}", fullmatch=True).filter(
    lambda name: not name.endswith("_created")
)
_values = st.floats(allow_nan=False, allow_infinity=False, width=32)
_labels = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.text(alphabet='ab"\\}{ #,=é', max_size=6), max_size=3
)


@given(st.lists(st.tuples(_names, _labels, _values), max_size=20))
def test_gauges_are_the_sum_over_their_labels(samples: list[tuple[str, dict[str, str], float]]) -> None:
    lines, wanted = [], dict[str, float]()
    for name, labels, value in samples:
        inside = ",".join(
            f'{key}="{text.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}"'
            for key, text in labels.items()
        )
        lines.append(f"{name}{{{inside}}} {value!r} 1700000000000\n")
        wanted[name] = wanted.get(name, 0.0) + value
    found = read("".join(lines).encode())
    assert (found.gauges, found.broken) == (wanted, 0)
