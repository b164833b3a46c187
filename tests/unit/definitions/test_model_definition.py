"""Model definition files: the document's own, good ones, and exactly what is said of wrong ones."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.definitions.model import parse, read
from dure.wire.errors import InvalidInput

DOCUMENT = """
models:
  - name: "simple-http-server"
    model_path: "/models"
    service:
      start_command:
        - python
        - -m
        - http.server
        - --directory
        - /home/work
        - "8000"
      port: 8000
      health_check:
        path: /
        interval: 10.0
        max_retries: 10
        max_wait_time: 15.0
        expected_status_code: 200
        initial_delay: 60.0
"""


def wrong(text: str) -> list[str]:
    """`place: message` of each problem, without the file's name."""
    definition, problems = read(text, "f")
    assert definition is None
    assert problems
    return [f"{problem.line} {problem.key}: {problem.message}" for problem in problems]


def service(body: str) -> str:
    """A file whose service begins on line 5."""
    return "models:\n- name: m\n  model_path: /models\n  service:\n" + "".join(
        f"    {line}\n" for line in body.splitlines()
    )


def actions(*lines: str) -> str:
    """A file whose first action is on line 8."""
    return service("start_command: x\nport: 80\npre_start_actions:\n" + "\n".join(f"- {a}" for a in lines))


def test_the_documents_example() -> None:
    definition = parse(DOCUMENT, "model-definition.yaml")
    kernel = definition.kernel
    assert definition.model_name == "simple-http-server"
    assert kernel.command.model_path == "/models"
    assert list(kernel.command.argv.args) == [
        "python", "-m", "http.server", "--directory", "/home/work", "8000"
    ]  # fmt: skip
    assert kernel.port == 8000
    assert kernel.fixed_port, "the command names the number"
    check = kernel.health_check
    assert (check.interval_ms, check.initial_delay_ms, check.max_wait_time_ms) == (10_000, 60_000, 15_000)
    assert (check.max_retries, check.expected_status_code) == (10, 200)


def test_defaults() -> None:
    kernel = parse(service("start_command: serve\nport: 9000\nhealth_check: {path: /h}"), "f").kernel
    assert kernel.command.shell.shell == "/bin/bash"
    check = kernel.health_check
    assert (check.interval_ms, check.initial_delay_ms, check.max_wait_time_ms) == (10_000, 60_000, 15_000)
    assert (check.max_retries, check.expected_status_code) == (10, 200)
    assert not check.probe_during_initial_delay
    assert not parse(service("start_command: serve\nport: 9000"), "f").kernel.HasField("health_check")


@pytest.mark.parametrize(
    ("command", "fixed"),
    [
        ('[serve, "8000"]', True),
        ("[serve, --port=8000]", True),
        ("serve --port 8000", True),
        ("serve --port=8000 | tee log", True),
        ('[serve, "{port}"]', False),
        ("serve $PORT --was 8000", False),
        ("serve ${PORT} 8000", False),
        ("serve --port 80001", False),
        ('[serve, "x8000"]', False),
        ('[sh, -c, "serve --quiet 8000 | tee log"]', True),
        ('[sh, -c, "serve $PORT --was 8000"]', False),
        ('[gunicorn, -b, "0.0.0.0:8000", "app:app"]', True),
        ("gunicorn --bind=0.0.0.0:8000 app:app", True),
        ("PORT=8000 serve", True),
        ("serve -p8000", True),
        ("python -c \"serve(('', 8000))\"", True),
        ("serve --max 18000", False),
    ],
)
def test_literal_ports(command: str, fixed: bool) -> None:
    assert parse(service(f"start_command: {command}\nport: 8000"), "f").kernel.fixed_port is fixed


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("serve --x 'a b' | tee $HOME/log", "serve --x 'a b' | tee $HOME/log"),
        ('"say \\"hi\\" && echo {\\"a\\": 1}"', 'say "hi" && echo {"a": 1}'),
        ("|\n  export A=1\n  exec serve\n", "export A=1\nexec serve\n"),
        (">-\n  serve\n  --flag\n", "serve --flag"),
        ("exec 모델-서버 --이름=값", "exec 모델-서버 --이름=값"),
    ],
)
def test_commands_as_text_come_through_as_written(command: str, line: str) -> None:
    kernel = parse(service(f"start_command: {command}\nport: 8000"), "f").kernel
    assert kernel.command.shell.line == line


@pytest.mark.parametrize(
    "text",
    [
        service("start_command: [serve, 8000, 1.5, '', \"true\"]\nport: 80"),
        service("start_command: x\nport: 8_000"),
        service("start_command: x\nport: 0x50"),
        service("start_command: x\nport: 80\nhealth_check:"),
        service("start_command: x\nport: 80\nshell:\npre_start_actions:"),
        service("start_command: x\nport: 80\npre_start_actions: []"),
        service(
            "start_command: x\nport: 80\nhealth_check: {path: '/h?a=1', interval: 1e1, initial_delay: 0}"
        ),
        service("start_command: x\nport: 80\nhealth_check: {path: /, probe_during_initial_delay: yes}"),
        service("start_command: x\nport: 80").replace("\n", "\r\n"),
        "---\n" + service("start_command: x\nport: 80") + "...\n",
        "%YAML 1.1\n---\n" + service("start_command: x\nport: 80"),
        "# 주석\n" + service("start_command: x\nport: 80").replace("name: m", "name: 모델"),
        '{"models": [{"name": "m", "model_path": "/m", "service": {"start_command": ["x"], "port": 80}}]}',
        "models:\n- {name: draft, model_path: /m}\n- {name: m, model_path: /m, service: "
        "{start_command: x, port: 80}}",
        "models: [{name: m, model_path: /m, service: {<<: {port: 80}, start_command: x}}]",
        "models:\n- &a {name: draft, model_path: /m}\n- {<<: *a, service: {start_command: x, port: 80}}",
        "models:\n- &a {name: d, model_path: /m}\n- {<<: [*a, {name: z}], service: "
        "{start_command: x, port: 80}}",
        service('start_command: \'awk "{print $1}" {unknown} ${HOME} {"json": {}}\'\nport: 80'),
        actions("{action: log, args: {message: a}}", "{action: mkdir, args: {path: /x, parents: no}}"),
        actions("{action: write_file, args: {filename: f, body: '', mode: 0o600}}"),
        actions(
            "{action: run_command, ref: r, args: {command: [a]}}",
            "{action: log, args: {message: '{r.out}'}}",
        ),
    ],
)
def test_good_files(text: str) -> None:
    assert parse(text, "f").model_name in ("m", "모델", "draft", "d")


# Text, and every problem as `line key: message`.
BAD = [
    ("", ["1 : the file is empty; expected a mapping with the key `models`"]),
    (" \n\t\n", ["1 : the file is empty; expected a mapping with the key `models`"]),
    ("# nothing", ["1 : the file has no content; expected a mapping with the key `models`"]),
    ("[1, 2]", ["1 : found a list, expected a mapping with the key `models`"]),
    ("text", ["1 : found the text `text`, expected a mapping with the key `models`"]),
    ("null", ["1 : found nothing, expected a mapping with the key `models`"]),
    ("models:", ["1 models: is required, but has no value"]),
    ("models: []", ["1 models: is empty; expected at least one model"]),
    ("models: 3", ["1 models: found the number `3`, expected a list of models"]),
    ("models: {name: m}", ["1 models: found a mapping, expected a list of models; begin each with `- `"]),
    (
        "models: [x]",
        [
            "1 models[0]: found the text `x`, expected a mapping with the keys `name`, `model_path`, "
            "`service`, `metadata`"
        ],
    ),
    (
        "model: []",
        [
            "1 model: unknown key; did you mean `models`?",
            "1 models: is required",
            "1 models: is empty; expected at least one model",
        ],
    ),
    (
        service("startCommand: [serve, {port}]\nprot: 8000\nhealthcheck: {paht: h}"),
        [
            "5 models[0].service.startCommand: unknown key; did you mean `start_command`?",
            "5 models[0].service.start_command: is required",
            "5 models[0].service.port: is required",
            "5 models[0].service.start_command[1]: found a mapping, expected text (a brace begins one: put "
            'it in quotes, "{port}")',
            "6 models[0].service.prot: unknown key; did you mean `port`?",
            "7 models[0].service.healthcheck: unknown key; did you mean `health_check`?",
            "7 models[0].service.health_check.paht: unknown key; did you mean `path`?",
            "7 models[0].service.health_check.path: is required",
            "7 models[0].service.health_check.path: found `h`; it must begin with `/` and have no spaces",
        ],
    ),
    ("models: [", ["1 : not YAML: expected the node content, but found '<stream end>'"]),
    ("a: 1\n---\nb: 2", ["2 : not YAML: a second document begins here (`---`), expected one document"]),
    ("models:\n\t- x", ["2 : not YAML: found a tab where only spaces may indent"]),
    (
        "models:\n- name: a: b",
        [
            "2 : not YAML: mapping values are not allowed here (a `: ` inside of a text: put the text in "
            "quotes; or wrong indentation)"
        ],
    ),
    ("a: \x07", ["1 : not YAML: the character U+0007 is not allowed"]),
    (
        "[" * 5000,
        ["1 : not YAML: nested too deeply, or an escape that is no character"],
    ),
    ("models: *nowhere", ["1 : not YAML: found undefined alias 'nowhere'"]),
    (
        "models: [{name: a, model_path: /m}]",
        ["1 models: no model has a `service`; exactly one must say how it is served"],
    ),
    (
        "models:\n- {name: a, model_path: /m, service: {start_command: x, port: 1}}\n"
        "- {name: b, model_path: /m, service: {start_command: x, port: 1}}",
        [
            "3 models[1].service: more than one model has a `service` (`models[0]` too); exactly one can be "
            "served"
        ],
    ),
    (
        "models:\n- name: 7\n  model_path: yes\n  service: {start_command: x, port: 1}",
        [
            "2 models[0].name: found the number `7`, expected text (put it in quotes)",
            "3 models[0].model_path: found the truth value `yes`, expected text (put it in quotes)",
        ],
    ),
    (
        "models:\n- name: ' '\n  model_path: ../etc\n  service: {start_command: x, port: 1}",
        [
            "2 models[0].name: must not be empty",
            "3 models[0].model_path: `../etc` is not an absolute path without `..`; expected one such as "
            "`/models`",
        ],
    ),
    (
        "models:\n- name: m\n  model_path: /m\n  port: 80\n  startCommand: x\n  service: 5",
        [
            "4 models[0].port: unknown key here; `port` belongs in `models[0].service`",
            "5 models[0].startCommand: unknown key; did you mean `start_command`, in `models[0].service`?",
            "6 models[0].service: found the number `5`, expected a mapping with the keys "
            "`pre_start_actions`, `start_command`, `shell`, `port`, `health_check`",
        ],
    ),
    (
        service("start_comand: x\nport: 80000\nhealth_check: {path: h, intervall: 1, max_retries: 0}"),
        [
            "5 models[0].service.start_comand: unknown key; did you mean `start_command`?",
            "5 models[0].service.start_command: is required",
            "6 models[0].service.port: found the number `80000`, expected a whole number from 1 to 65535",
            "7 models[0].service.health_check.intervall: unknown key; did you mean `interval`?",
            "7 models[0].service.health_check.path: found `h`; it must begin with `/` and have no spaces",
            "7 models[0].service.health_check.max_retries: found the number `0`, expected a whole number "
            "from 1 to 1000000",
        ],
    ),
    (
        service("start_command: []\nport: 2200"),
        [
            "5 models[0].service.start_command: must not be empty; the first item is the program",
            "6 models[0].service.port: 2200 is reserved (2000, 2001, 2200, 7681 are); choose another",
        ],
    ),
    (
        service("start_command: ['', a]\nport: 1"),
        ["5 models[0].service.start_command[0]: must not be empty: it is the program"],
    ),
    (
        service("start_command: {a: b}\nport: 1"),
        ["5 models[0].service.start_command: found a mapping, expected text or a list of texts"],
    ),
    (
        service("start_command: [a, true, 2026-01-01, null, [b]]\nport: 1"),
        [
            "5 models[0].service.start_command[1]: found the truth value `true`, expected text (put it in "
            "quotes)",
            "5 models[0].service.start_command[2]: found the date `2026-01-01`, expected text (put it in "
            "quotes)",
            "5 models[0].service.start_command[3]: found nothing, expected text (put it in quotes)",
            "5 models[0].service.start_command[4]: found a list, expected text",
        ],
    ),
    (
        service('start_command: ["sl\\0eep"]\nport: 1'),
        ["5 models[0].service.start_command[0]: must not contain a NUL character"],
    ),
    (
        service('start_command: "a\\ud800"\nport: 1'),
        [
            "5 models[0].service.start_command: has an escape that is not a character of its own (a lone "
            "surrogate)"
        ],
    ),
    (
        service("start_command: x\nshell: bash\nport:"),
        [
            "6 models[0].service.shell: found `bash`, expected the absolute path of a shell, such as "
            "`/bin/sh`",
            "7 models[0].service.port: is required, but has no value",
        ],
    ),
    (
        service("start_command: x\nport: 1\nport: 2"),
        ["7 models[0].service.port: the key stands here twice; the first time on line 6"],
    ),
    (
        service("start_command: x\nport: 1\n? [a]\n: b"),
        ["7 models[0].service: found a list as a key, expected a word"],
    ),
    *(
        (service(f"start_command: x\nport: {port}"), [f"6 models[0].service.port: found {found}"])
        for port, found in [
            ("'8000'", "the text `8000`, expected a whole number from 1 to 65535 (without quotes)"),
            ("8000.0", "the number `8000.0`, expected a whole number from 1 to 65535"),
            ("1e3", "the text `1e3`, expected a whole number from 1 to 65535"),
            ("true", "the truth value `true`, expected a whole number from 1 to 65535"),
            ("on", "the truth value `on`, expected a whole number from 1 to 65535"),
            ("-1", "the number `-1`, expected a whole number from 1 to 65535"),
            ("80:30", "the number `80:30`, expected a whole number from 1 to 65535"),
            (
                "0200",
                "the number `0200`, expected a whole number from 1 to 65535 (a zero in front makes it octal)",
            ),
            ("0o17", "the text `0o17`, expected a whole number from 1 to 65535"),
            ("!!int abc", "the number `abc`, expected a whole number from 1 to 65535"),
            ("!py x", "the value `x`, expected a whole number from 1 to 65535"),
            ("[80]", "a list, expected a whole number from 1 to 65535"),
        ]
    ),
    *(
        (
            service(f"start_command: x\nport: 1\nhealth_check: {{path: /, {key}: {value}}}"),
            [f"7 models[0].service.health_check.{key}: found {found}"],
        )
        for key, value, found in [
            ("interval", "0", "the number `0`, expected seconds, more than 0, at most 86400"),
            ("interval", ".nan", "the number `.nan`, expected seconds, more than 0, at most 86400"),
            ("interval", ".inf", "the number `.inf`, expected seconds, more than 0, at most 86400"),
            ("interval", "10s", "the text `10s`, expected seconds, more than 0, at most 86400"),
            (
                "interval",
                "'10'",
                "the text `10`, expected seconds, more than 0, at most 86400 (without quotes)",
            ),
            ("interval", "no", "the truth value `no`, expected seconds, more than 0, at most 86400"),
            ("initial_delay", "-1", "the number `-1`, expected seconds, 0 or more, at most 86400"),
            ("max_wait_time", "1e9", "the text `1e9`, expected seconds, more than 0, at most 86400"),
            ("max_retries", "1.5", "the number `1.5`, expected a whole number from 1 to 1000000"),
            ("expected_status_code", "99", "the number `99`, expected a whole number from 100 to 599"),
            ("probe_during_initial_delay", "1", "the number `1`, expected true or false"),
            (
                "probe_during_initial_delay",
                "'true'",
                "the text `true`, expected true or false without quotes",
            ),
        ]
    ),
    (
        service("start_command: x\nport: 1\nhealth_check: /health"),
        [
            "7 models[0].service.health_check: found the text `/health`, expected a mapping with the keys "
            "`path`, `interval`, `max_retries`, `max_wait_time`, `expected_status_code`, `initial_delay`, "
            "`probe_during_initial_delay`"
        ],
    ),
    (
        service("start_command: x\nport: 1\nhealth_check: {path: '/a b', port: 80}"),
        [
            "7 models[0].service.health_check.port: unknown key here; `port` belongs in `models[0].service`",
            "7 models[0].service.health_check.path: found `/a b`; it must begin with `/` and have no spaces",
        ],
    ),
    (
        actions("{action: mkdri, args: {}}", "{args: {}}", "{action: log}", "log"),
        [
            "8 models[0].service.pre_start_actions[0].action: unknown action `mkdri`; did you mean `mkdir`?",
            "9 models[0].service.pre_start_actions[1].action: is required",
            "10 models[0].service.pre_start_actions[2].args: is required",
            "11 models[0].service.pre_start_actions[3]: found the text `log`, expected a mapping with the "
            "keys `action`, `args`, `ref`",
        ],
    ),
    (
        actions(
            "{action: mkdir, args: {}}",
            "{action: mkdir, args: []}",
            "{action: run_command, args: {command: ls -l}}",
            "{action: run_command, args: {command: []}}",
            "{action: write_tempfile, args: {body: {a: b}, suffix: a/b}}",
            "{action: log, args: {message: a, debg: true}}",
        ),
        [
            "8 models[0].service.pre_start_actions[0].args.path: is required",
            "9 models[0].service.pre_start_actions[1].args: found a list, expected a mapping with the keys "
            "`path`, `parents`",
            "10 models[0].service.pre_start_actions[2].args.command: found the text `ls -l`, expected a list "
            "of texts",
            "11 models[0].service.pre_start_actions[3].args.command: must not be empty; the first item is "
            "the program",
            "12 models[0].service.pre_start_actions[4].args.body: found a mapping, expected text or a list "
            "of lines",
            "12 models[0].service.pre_start_actions[4].args.suffix: must not contain `/`: it is the end of a "
            "file name",
            "13 models[0].service.pre_start_actions[5].args.debg: unknown key; did you mean `debug`?",
        ],
    ),
    *(
        (
            actions(f"{{action: write_file, args: {{filename: f, body: b, mode: {mode}}}}}"),
            [
                f"8 models[0].service.pre_start_actions[0].args.mode: found {found}, expected three octal "
                'digits such as "644"'
            ],
        )
        for mode, found in [
            ("rw", "the text `rw`"),
            ("999", "the number `999`"),
            ("64", "the number `64`"),
            ("7777", "the number `7777`"),
            ("[6]", "a list"),
        ]
    ),
    (
        actions(
            "{action: log, args: {message: '{later} {r}'}}",
            "{action: run_command, ref: later, args: {command: [a, '{later.out}']}}",
            "{action: mkdir, ref: later, args: {path: a}}",
            "{action: mkdir, ref: port, args: {path: a}}",
            "{action: mkdir, ref: a b, args: {path: a}}",
        ),
        [
            "8 models[0].service.pre_start_actions[0]: `{later}` is the result of "
            "models[0].service.pre_start_actions[1], which runs later",
            "9 models[0].service.pre_start_actions[1]: `{later}` is the result of "
            "models[0].service.pre_start_actions[1], which is this action itself",
            "10 models[0].service.pre_start_actions[2].ref: `later` is the ref of "
            "models[0].service.pre_start_actions[1] already",
            "11 models[0].service.pre_start_actions[3].ref: `{port}` has a meaning of its own already; "
            "choose another name",
            "12 models[0].service.pre_start_actions[4].ref: found `a b`, expected a letter or `_`, then "
            "letters, digits, `_` and `-`",
        ],
    ),
    (
        service("start_command: x\nport: 1") + "  metadata: {titel: a, framework: x, min_resource: 3}\n",
        [
            "7 models[0].metadata.titel: unknown key; did you mean `title`?",
            "7 models[0].metadata.framework: found the text `x`, expected a list of texts",
            "7 models[0].metadata.min_resource: found the number `3`, expected a mapping of slots to amounts",
        ],
    ),
    (
        "models:\n- &m {name: a, model_path: /m, <<: *m}",
        ["2 models[0].<<: merges itself"],
    ),
    (
        "models:\n- {name: a, model_path: /m, <<: 3}",
        ["2 models[0].<<: found the number `3`, expected a mapping to merge"],
    ),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad_files(text: str, says: list[str]) -> None:
    assert wrong(text) == says


def test_an_exception_says_where_and_what() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(service("start_command: x\nport: 0"), "dir/f.yaml")
    (violation,) = caught.value.violations
    assert violation.field == "dir/f.yaml:6: models[0].service.port"
    assert violation.description == "found the number `0`, expected a whole number from 1 to 65535"


def test_a_good_file_with_everything() -> None:
    definition = parse(
        actions(
            "{action: write_file, args: {filename: a, body: [x, y, 3], append: True, mode: '600'}}",
            "{action: write_tempfile, ref: t, args: {body: 'print(1)'}}",
            "{action: run_command, ref: r, args: {command: [echo, 1], echo: on, check: false}}",
            "{action: mkdir, args: {path: /home/work/d}}",
            "{action: log, args: {message: 'hi {r.out}', debug: yes}}",
        )
        + "  metadata:\n    author: A\n    version: 1.0\n    created: 2026-01-31\n    framework: [a, b]\n"
        "    min_resource: {cpu: 2, mem: 8g, cuda.shares: 0.5}\n    license: ~\n",
        "f",
    )
    write, temporary, command, mkdir, log = definition.kernel.pre_start_actions
    assert (write.write_file.body, write.write_file.append, write.write_file.mode) == (
        "x\ny\n3\n",
        True,
        0o600,
    )
    assert (temporary.ref, temporary.write_tempfile.suffix, temporary.write_tempfile.mode) == (
        "t",
        ".py",
        0o644,
    )
    assert (command.ref, list(command.run_command.command)) == ("r", ["echo", "1"])
    assert (command.run_command.echo, command.run_command.check) == (True, False)
    assert (mkdir.mkdir.path, mkdir.mkdir.parents) == ("/home/work/d", True)
    assert (log.log.message, log.log.debug) == ("hi {r.out}", True)
    assert definition.metadata == {
        "author": "A",
        "version": "1.0",
        "created": "2026-01-31",
        "framework": ["a", "b"],
        "min_resource": {"cpu": "2", "mem": "8g", "cuda.shares": "0.5"},
    }


LONG_WORDS = (
    "models:\n- name: &b '" + "a" * 100_000 + "'\n  model_path: /m\n"
    "  service: {port: 1, start_command: [" + "*b," * 20_000 + "]}\n"
)
MANY_WORDS = (
    "models:\n- name: m\n  model_path: /m\n  metadata: {label: &l [" + "a," * 2_000 + "]}\n"
    "  service:\n    start_command: x\n    port: 1\n    pre_start_actions:\n"
    + "    - {action: run_command, args: {command: *l}}\n"
    * 100
)


@pytest.mark.parametrize("bomb", [LONG_WORDS, MANY_WORDS], ids=["long words", "many words"])
def test_alias_bombs_are_refused(bomb: str) -> None:
    assert any("expand to too much" in text for text in wrong(bomb))


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    definition, problems = read(text, "f")
    assert (definition is None) == bool(problems)
    for problem in problems:
        problem.violation.description.encode()
        problem.violation.field.encode()


_WORDS = """
    name model_path service metadata start_command port shell health_check path interval max_retries
    pre_start_actions action args ref body filename mode command message framework min_resource <<
"""
# YAML breaks lines at more characters than we count here.
_TEXT = st.text(st.characters(exclude_characters="\r\x85\u2028\u2029", exclude_categories=["Cs"]), max_size=8)
_KEYS = st.sampled_from(_WORDS.split()) | _TEXT
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | _TEXT
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from(["/", "/models", "{port}", "log", "mkdir", "write_file", "run_command", "8000"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=4), st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_any_values_are_read_or_refused(model: dict[str, object], service: dict[str, object]) -> None:
    whole = {"models": [{"name": "m", "model_path": "/m", "service": service, **model}]}
    text = yaml.safe_dump(whole, allow_unicode=True)
    definition, problems = read(text, "f")
    assert (definition is None) == bool(problems)
    if definition is not None:
        assert 1 <= definition.kernel.port <= 65535
        assert definition.kernel.command.WhichOneof("start")
    for problem in problems:
        problem.place.encode()
        assert 0 < problem.line <= text.count("\n") + 1
