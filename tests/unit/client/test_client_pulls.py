"""Images that are being fetched: what a person reads of them adds up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.client.cli import pulling
from dure.client.pulls import amount_of, fetches, progress, sentence, shown_layers
from dure.v1.endpoint_pb2 import ImageLayer, ImagePull, Kernel

MIB = 2**20


def layer(status: str, current: float = 0, total: float = 0, id: str = "x") -> ImageLayer:
    return ImageLayer(id=id, status=status, current_bytes=int(current * MIB), total_bytes=int(total * MIB))


def pull(*layers: ImageLayer, image: str = "example.com/server:1") -> ImagePull:
    return ImagePull(image=image, layers=layers)


DONE = [layer("Pull complete", 40, 40), layer("Already exists"), layer("Pull complete", 20, 20)]


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], ""),
        ([layer("Pulling fs layer"), layer("Waiting")], ": 0 of 2 layers"),
        (
            [*DONE, layer("Downloading", 60, 740), layer("Waiting", 0, 0)],
            ": 3 of 5 layers, 120 of 800+ MiB",
        ),
        ([*DONE, layer("Downloading", 60, 740)], ": 3 of 4 layers, 120 of 800 MiB"),
        ([layer("Downloading", 512, 2048)], ": 0 of 1 layers, 0.5 of 2 GiB"),
        ([layer("Downloading", 3)], ": 0 of 1 layers, 3 of 3+ MiB"),
        ([*DONE, layer("Extracting", 1, 740)], ": 3 of 4 layers, 800 of 800 MiB, unpacking"),
        ([*DONE, layer("Download complete", 740, 740)], ": 3 of 4 layers, 800 of 800 MiB, unpacking"),
        (DONE, ": 3 of 3 layers, 60 of 60 MiB"),
        ([layer("Retrying in 5 seconds", 0, 10)], ": 0 of 1 layers, 0 of 10 MiB"),
        ([layer("Downloading", 900, 740)], ": 0 of 1 layers, 740 of 740 MiB"),
    ],
)
def test_a_sentence(layers: list[ImageLayer], text: str) -> None:
    assert sentence(pull(*layers)) == f"pulling example.com/server:1{text}"


STEPS = [
    "Pulling fs layer",
    "Waiting",
    "Downloading",
    "Downloading",
    "Verifying Checksum",
    "Download complete",
]
STEPS += ["Extracting", "Extracting", "Pull complete"]


@given(
    sizes=st.lists(st.integers(0, 10**12), min_size=1, max_size=8),
    order=st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1)), max_size=120),
)
def test_a_fetch_only_grows_until_all_is_here(sizes: list[int], order: list[tuple[int, float]]) -> None:
    """Layers go through an engine's steps in any order; their sizes are known from their first bytes on."""
    at = [0] * len(sizes)
    layers = [ImageLayer(status=STEPS[0]) for _ in sizes]
    before = progress(layers)
    order += [(number, 1.0) for number in range(len(sizes)) for _ in STEPS]
    for number, part in order:
        number %= len(sizes)
        if at[number] == len(STEPS) - 1:
            continue
        at[number] += 1
        status, size = STEPS[at[number]], sizes[number]
        moved = ImageLayer(status=status)
        if at[number] >= 2:
            moved.total_bytes = size
            again = layers[number].status == status
            got = int(size * part)
            moved.current_bytes = max(got, layers[number].current_bytes) if again else got
        layers[number] = moved
        now = progress(layers)
        assert 0 <= before.here_bytes <= now.here_bytes <= now.total_bytes <= sum(sizes)
        assert before.done <= now.done <= now.layers == len(sizes)
        assert not (before.unpacking and not now.unpacking and now.done < now.layers)
        before = now
    assert (before.done, before.here_bytes, before.more, before.unpacking) == (
        len(sizes),
        sum(sizes),
        False,
        False,
    )


@given(
    statuses=st.lists(st.sampled_from([*STEPS, "Already exists", "Retrying in 3 seconds"]), max_size=40),
    most=st.integers(1, 10),
)
def test_every_layer_is_shown_or_counted(statuses: list[str], most: int) -> None:
    layers = [layer(status, 1, 2, id=str(number)) for number, status in enumerate(statuses)]
    shown, others = shown_layers(layers, most)
    assert len(shown) + bool(others) <= most
    counted = sum(int(word) for word in others.partition(": ")[2].split() if word.isdigit())
    counted -= 3 * ("Retrying in 3" in others)
    assert len(shown) + counted == len(layers)
    kernels = [Kernel(uid="k", node="agents/n", pull=pull(*layers))]
    assert len(pulling.lines(kernels, room=most + 1, color=False)) <= 1 + most


def test_kernels_of_a_node_share_what_it_fetches() -> None:
    early, late = pull(layer("Downloading", 1, 9)), pull(layer("Downloading", 2, 9))
    other = pull(layer("Downloading", 3, 9), image="other")
    kernels = [
        Kernel(uid="1", node="agents/b", pull=early),
        Kernel(uid="2", node="agents/a", pull=early),
        Kernel(uid="3", node="agents/a", pull=late),
        Kernel(uid="4", node="agents/a", pull=other),
        Kernel(uid="5", node="agents/a"),
    ]
    found = [(fetch.node, fetch.pull, fetch.kernels) for fetch in fetches(kernels)]
    assert found == [("a", late, 2), ("a", other, 1), ("b", early, 1)]
    first, *_ = pulling.lines(kernels, room=40, color=False)
    assert first == "a: pulling example.com/server:1: 0 of 1 layers, 2 of 9 MiB (2 sessions wait for it)"


def test_bars() -> None:
    layers = [
        layer("Downloading", 6, 12, id="0123456789abcdef"),
        layer("Extracting", 12, 12, id="b"),
        layer("Downloading", 3, id="c"),
        layer("Waiting\x1b[31m", id="d"),
        layer("Already exists", id="e"),
    ]
    assert pulling.lines([Kernel(node="n", pull=pull(*layers))], room=20, color=False)[1:] == [
        "  0123456789ab  Downloading         [############............] 6 of 12 MiB",
        "  b             Extracting          [########################] 12 of 12 MiB",
        "  c             Downloading         3 MiB",
        "  d             Waiting?[31m",
        "  e             Already exists",
    ]
    few = pulling.lines([Kernel(node="n", pull=pull(*layers))], room=4, color=False)
    assert few[1:] == [
        "  0123456789ab  Downloading         [############............] 6 of 12 MiB",
        "  b             Extracting          [########################] 12 of 12 MiB",
        "  and 3 more: 1 Downloading, 1 Waiting?[31m, 1 Already exists",
    ]


def test_many_nodes_are_summed_up_and_lines_come_now_and_then() -> None:
    def kernels(done: int) -> list[Kernel]:
        return [Kernel(node=f"n{node}", pull=pull(layer("Downloading", done, 100))) for node in range(6)]

    assert pulling.lines(kernels(1), room=3, color=False)[-1] == "and 2 images more on other nodes"
    ticker, said = pulling.Ticker(), []
    for tenth in range(101):
        said += [(tenth, line) for line in ticker.due(kernels(tenth // 2), tenth / 10)]
    assert sorted({tenth for tenth, _ in said}) == [0, 50, 100]
    # The line that sums up has nothing new to say.
    assert len(said) == 5 + 4 + 4
    assert said[5] == (50, "n0: pulling example.com/server:1: 0 of 1 layers, 25 of 100 MiB")
    assert ticker.due([], 11) == [] and len(ticker.due(kernels(9), 11.1)) == 5


def test_units() -> None:
    assert amount_of(5, 900) == "5 of 900 B"
    assert amount_of(0, 1) == "0 of 1 B"
    assert amount_of(3 * 2**40, 4 * 2**40, more=True) == "3 of 4+ TiB"
