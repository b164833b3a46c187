"""Definition files: the document's own, and what is said of wrong ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.manager.definition import parse
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


def wrong(text: str) -> dict[str, str]:
    with pytest.raises(InvalidInput) as caught:
        parse(text, "f.yaml")
    return {violation.field: violation.description for violation in caught.value.violations}


def service(body: str) -> str:
    return "models:\n- name: m\n  model_path: /models\n  service:\n" + "".join(
        f"    {line}\n" for line in body.splitlines()
    )


def test_the_documents_example() -> None:
    definition = parse(DOCUMENT, "model-definition.yaml")
    kernel = definition.kernel
    assert definition.model_name == "simple-http-server"
    assert list(kernel.command.argv.args)[-1] == "8000"
    assert kernel.port == 8000
    assert kernel.fixed_port, "the command names the number"
    check = kernel.health_check
    assert (check.interval_ms, check.initial_delay_ms, check.max_wait_time_ms) == (10_000, 60_000, 15_000)
    assert (check.max_retries, check.expected_status_code) == (10, 200)


def test_defaults() -> None:
    kernel = parse(service("start_command: serve\nport: 9000\nhealth_check: {path: /h}"), "f").kernel
    assert kernel.command.shell.shell == "/bin/bash"
    assert kernel.health_check.initial_delay_ms == 60_000
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
    ],
)
def test_literal_ports(command: str, fixed: bool) -> None:
    assert parse(service(f"start_command: {command}\nport: 8000"), "f").kernel.fixed_port is fixed


def test_all_errors_at_once_with_line_path_and_hint() -> None:
    found = wrong(
        service("start_comand: x\nport: 80000\nhealth_check: {path: h, intervall: 1, max_retries: 0}")
    )
    assert "did you mean `start_command`" in found["f.yaml:5: models[0].service.start_comand"]
    assert found["f.yaml:5: models[0].service.start_command"] == "is required"
    assert "from 1 to 65535" in found["f.yaml:6: models[0].service.port"]
    assert "begin with `/`" in found["f.yaml:7: models[0].service.health_check.path"]
    assert "`interval`" in found["f.yaml:7: models[0].service.health_check.intervall"]
    assert len(found) == 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("# nothing", "no content"),
        ("models: [", "not YAML"),
        ("[1, 2]", "found a list, expected a mapping"),
        ("models: []", "at least one"),
        ("models: 3", "found the number `3`"),
        ("model: []", "did you mean `models`"),
        ("models: [{name: a, model_path: /m}]", "no model has a `service`"),
        (service("start_command: x\nport: 2200"), "reserved"),
        (service("start_command: []\nport: 1"), "must not be empty"),
        (service('start_command: ["sl\\0eep"]\nport: 1'), "NUL"),
        (service("start_command: x\nport: 1").replace("/models", "../etc"), "not an absolute path"),
        (service("start_command: {a: b}\nport: 1"), "expected text or a list"),
        (service("start_command: x\nport: '80'"), "found the text `80`"),
        (service("start_command: x\nport: true"), "found the truth value"),
        (service("start_command: x\nport: 1\nport: 2"), "twice"),
        (service("start_command: x\nport: 1\nhealth_check: {path: /, interval: .nan}"), "more than 0"),
        (service("start_command: x\nport: 1\npre_start_actions: [{action: mkdri, args: {}}]"), "`mkdir`"),
        (service("start_command: x\nport: 1\npre_start_actions: [{action: mkdir, args: {}}]"), "required"),
    ],
)
def test_each_error_says_what_was_found(text: str, says: str) -> None:
    assert any(says in description for description in wrong(text).values())


def test_two_services_are_one_too_many() -> None:
    one = "- name: a\n  model_path: /m\n  service: {start_command: x, port: 1}\n"
    assert any("more than one" in text for text in wrong("models:\n" + one + one).values())


def test_actions() -> None:
    kernel = parse(
        service(
            "start_command: x\nport: 1\npre_start_actions:\n"
            "- {action: write_file, args: {filename: a, body: [x, y], append: True, mode: '600'}}\n"
            "- {action: run_command, ref: r, args: {command: [echo, 1]}}\n"
            "- {action: log, args: {message: hi}}"
        ),
        "f",
    ).kernel
    write, command, _ = kernel.pre_start_actions
    assert (write.write_file.body, write.write_file.append, write.write_file.mode) == ("x\ny\n", True, 0o600)
    assert (command.ref, list(command.run_command.command)) == ("r", ["echo", "1"])
    assert command.run_command.check


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text, "f")
    except InvalidInput as error:
        assert error.violations
