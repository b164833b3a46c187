"""Service definition files: the document's own, and exactly what is said of wrong ones."""

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.definitions.service import BUILTIN_RUNTIMES, parse, read
from dure.definitions.toml_lines import key_lines
from dure.wire.errors import InvalidInput

DOCUMENT = """
[vllm.environment]
image        = "example.com/model-server:latest"
architecture = "x86_64"

[vllm.resource_slots]
cpu = 1
mem = "8gb"
"cuda.shares" = "0.5"

[vllm.environ]
MODEL_NAME = "example-model-name"
"""
# Two lines, so that what is tested begins on line 3.
HEAD = '[vllm.environment]\nimage = "i"'


def wrong(text: str) -> list[str]:
    definition, problems = read(text, "f", BUILTIN_RUNTIMES)
    assert definition is None
    assert problems
    return [f"{problem.line} {problem.key}: {problem.message}" for problem in problems]


def vllm(text: str) -> str:
    """A right environment on lines 1 to 3, then `text`."""
    return f'{HEAD}\narchitecture = "x86_64"\n{text}'


def test_the_documents_example() -> None:
    section = parse(DOCUMENT, "f", BUILTIN_RUNTIMES)["vllm"]
    assert (section.image, section.architecture) == ("example.com/model-server:latest", "x86_64")
    assert section.slots == {"cpu": 1000, "mem": 8 * 2**30 * 1000, "cuda.shares": 500}
    assert section.environ == {"MODEL_NAME": "example-model-name"}


@pytest.mark.parametrize(
    ("line", "slot", "amount"),
    [
        ("cpu = 2", "cpu", 2000),
        ("cpu = 0.5", "cpu", 500),
        ('cpu = "1.5"', "cpu", 1500),
        ("cpu = 1.0", "cpu", 1000),
        ('mem = "512m"', "mem", 2**29 * 1000),
        ("mem = 1_073_741_824", "mem", 2**30 * 1000),
        ("mem = 1e9", "mem", 10**12),
        ('"cuda.shares" = 0.5', "cuda.shares", 500),
        ("'cuda.shares' = \"1.00\"", "cuda.shares", 1000),
        ('"cuda.device" = 2', "cuda.device", 2000),
    ],
)
def test_amounts(line: str, slot: str, amount: int) -> None:
    assert parse(vllm(f"[vllm.resource_slots]\n{line}"), "f", ["vllm"])["vllm"].slots == {slot: amount}


@pytest.mark.parametrize(
    "text",
    [
        'vllm = {environment = {image = "i", architecture = "x86_64"}, environ = {A = "1"}}',
        'vllm.environment.image = "i"\nvllm.environment.architecture = "x86_64"\nvllm.environ.A = "1"',
        vllm("[vllm.environ]\nA = '''1'''").replace("\n", "\r\n"),
        vllm('[vllm.environ] # why\nA = "1"\n[custom.environment]\nimage="i"\narchitecture="aarch64"\n'),
    ],
)
def test_other_forms_of_the_same(text: str) -> None:
    section = parse(text, "f", BUILTIN_RUNTIMES)["vllm"]
    assert (section.image, section.environ) == ("i", {"A": "1"})


def test_the_order_of_runtimes_is_the_files() -> None:
    environment = '.environment]\nimage = "i"\narchitecture = "x86_64"\n'
    text = f"[sglang{environment}[cmd{environment}[custom{environment}"
    assert list(parse(text, "f", BUILTIN_RUNTIMES)) == ["sglang", "cmd", "custom"]


BAD = [
    ("", ["1 : the file is empty; expected sections such as [vllm.environment] and [vllm.resource_slots]"]),
    (
        "# only this",
        ["1 : has no section; expected some such as [vllm.environment] and [vllm.resource_slots]"],
    ),
    ("[vllm", ["1 : not TOML: Expected ']' at the end of a table declaration"]),
    ("x = ", ["1 : not TOML: Invalid value (text goes in quotes)"]),
    ("\n\na = 1\na = 2", ["4 : not TOML: Cannot overwrite a value (it stands in the file before)"]),
    (
        vllm("[vllm.environment]"),
        ["4 : not TOML: Cannot declare ('vllm', 'environment') twice (it stands in the file before)"],
    ),
    (
        "[vlm.environment]\nimage = 'i'\narchitecture = 'x86_64'",
        ["1 vlm: unknown runtime `vlm`; did you mean `vllm`?"],
    ),
    (
        "[environment]\nimage = 'i'",
        ["1 environment: a section begins with its runtime: write [custom.environment], or another one"],
    ),
    (
        "image = 'i'",
        [
            "1 image: unknown runtime `image`; known: vllm, sglang, nim, huggingface-tgi, llama-cpp, "
            "modular-max, cmd, custom",
            "1 image: found the text `i`, expected a section such as [image.environment]",
        ],
    ),
    ("vllm = 1", ["1 vllm: found the number `1`, expected a section such as [vllm.environment]"]),
    (
        "[vllm.resource_slots]\ncpu = 1",
        ["1 vllm.environment: is required: [vllm.environment] with `image` and `architecture`"],
    ),
    (HEAD, ["1 vllm.environment.architecture: is required"]),
    (
        "[vllm.environment]\nimage = ''\narchitecture = 1\nimagee = 'x'",
        [
            "2 vllm.environment.image: must not be empty",
            "3 vllm.environment.architecture: found the number `1`, expected text (put it in quotes)",
            "4 vllm.environment.imagee: unknown key; did you mean `image`?",
        ],
    ),
    (
        "[vllm.environment]\nimage = 'two words'\narchitecture = 'amd64'",
        [
            "2 vllm.environment.image: found `two words`, expected a path such as "
            "`example.com/model-server:latest`",
            "3 vllm.environment.architecture: unknown architecture `amd64`; did you mean `x86_64`?",
        ],
    ),
    (
        vllm("[vllm.resources]\ncpu = 1\n[vllm.environment_variables]\nA = 'x'"),
        [
            "4 vllm.resources: unknown section; did you mean `resource_slots`?",
            "6 vllm.environment_variables: unknown section; did you mean `environment`?",
        ],
    ),
    (
        "[vllm]\nimage = 'i'\ncpu = 1\nMODEL = 'x'\n[vllm.environment]\nimage = 'i'\narchitecture = 'x86_64'",
        [
            "2 vllm.image: unknown section; `image` belongs in [vllm.environment]",
            "3 vllm.cpu: unknown section; `cpu` belongs in [vllm.resource_slots]",
            "4 vllm.MODEL: unknown section; `MODEL` belongs in [vllm.environ]",
        ],
    ),
    (
        vllm("[[vllm.resource_slots]]\ncpu = 1"),
        [
            "4 vllm.resource_slots: found a list, expected a section [vllm.resource_slots] (written as "
            "[[vllm.resource_slots]]; write [vllm.resource_slots])"
        ],
    ),
    (
        vllm('[vllm.resource_slots]\ncuda.shares = "0.5"'),
        [
            "5 vllm.resource_slots.cuda.shares: the dot makes a section of its own of `cuda`; put the key in "
            'quotes, as in "cuda.shares" = "0.5"'
        ],
    ),
    (
        vllm('[vllm.resource_slots]\nmem = "8zb"\ncpu = true\n"cuda.share" = "1"\n"cuda.shares" = 0.333'),
        [
            "5 vllm.resource_slots.mem: `8zb`: unknown unit `zb`; write bytes or k, m, g, t (powers of 1024)",
            "6 vllm.resource_slots.cpu: found the truth value `true`, expected a number or text such as "
            '"0.5"',
            '7 vllm.resource_slots."cuda.share": unknown slot; did you mean `cuda.shares`?',
            '8 vllm.resource_slots."cuda.shares": `0.333` is not a multiple of 0.01 (1.00 is one GPU); the '
            "nearest are 0.33 and 0.34",
        ],
    ),
    (
        vllm('[vllm.resource_slots]\ncpu = -1\nmem = 0\n"cuda.shares" = 1\n"cuda.device" = 1'),
        [
            "4 vllm.resource_slots: `cuda.shares` and `cuda.device` exclude each other: keep one",
            "5 vllm.resource_slots.cpu: `-1` is not an amount; write a positive number such as `1.5`",
            "6 vllm.resource_slots.mem: `0` must be more than zero",
        ],
    ),
    (
        vllm("[vllm.resource_slots]\ncpu = inf\nmem = nan\n"),
        [
            "5 vllm.resource_slots.cpu: `inf` is not an amount; write a positive number such as `1.5`",
            "6 vllm.resource_slots.mem: `nan` is not an amount; write a positive number such as `8g`",
        ],
    ),
    (
        vllm(
            "[vllm.environ]\nA = 8\nB = true\nC = [1]\nPORT = '1'\nDURE_X = 'a'\n'b-c' = 'x'\n"
            "D = 2026-01-31"
        ),
        [
            '5 vllm.environ.A: found the number `8`, expected text: put it in quotes, "8"',
            '6 vllm.environ.B: found the truth value `true`, expected text: put it in quotes, "true"',
            "7 vllm.environ.C: found a list, expected text",
            "8 vllm.environ.PORT: is set by Dure itself; choose another name",
            "9 vllm.environ.DURE_X: is set by Dure itself; choose another name",
            "10 vllm.environ.b-c: is not a name: letters, digits and `_`, no digit first",
            '11 vllm.environ.D: found the date or time `2026-01-31`, expected text: put it in quotes, '
            '"2026-01-31"',
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad_files(text: str, says: list[str]) -> None:
    assert wrong(text) == says


def test_lines_are_found_behind_everything_that_looks_like_a_key() -> None:
    text = (
        'a = """\nb = 1\n[c]\n"""\nb = [\n  1, # ]\n  2\n]\n[ "d.e" . f ]\n'
        "g.'h i' = '''\n''' # x\nj = {k = 1}\n"
    )
    assert key_lines(text) == {
        ("a",): 1,
        ("b",): 5,
        ("d.e",): 9,
        ("d.e", "f"): 9,
        ("d.e", "f", "g"): 10,
        ("d.e", "f", "g", "h i"): 10,
        ("d.e", "f", "j"): 12,
    }


def test_an_exception_lists_all() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse("[vllm.environment]\nimage = 1", "f.toml", ["vllm"])
    assert [violation.field for violation in caught.value.violations] == [
        "f.toml:1: vllm.environment.architecture",
        "f.toml:2: vllm.environment.image",
    ]


_VALUES = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.dates()
    | st.lists(st.integers(0, 3), max_size=3)
)
_WORDS = ["image", "architecture", "cpu", "mem", "cuda.shares", "cuda", "A", "PORT"]
_KEYS = st.sampled_from(_WORDS) | st.text(max_size=5)
_TABLES = st.dictionaries(_KEYS, _VALUES | st.dictionaries(_KEYS, _VALUES, max_size=2), max_size=5)
_SECTIONS = st.sampled_from(["environment", "resource_slots", "environ"]) | st.text(max_size=5)
_RUNTIMES = st.sampled_from(["vllm", "custom", "environ"]) | st.text(max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_RUNTIMES, _VALUES | st.dictionaries(_SECTIONS, _VALUES | _TABLES, max_size=3)))
def test_any_values_are_read_or_refused(value: dict[str, object]) -> None:
    text = tomli_w.dumps(value)
    definition, problems = read(text, "f", BUILTIN_RUNTIMES)
    assert (definition is None) == bool(problems)
    for problem in problems:
        problem.place.encode()
        problem.message.encode()
        assert 1 <= problem.line <= text.count("\n") + 1


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    definition, problems = read(text, "f", BUILTIN_RUNTIMES)
    assert (definition is None) == bool(problems)
