"""What a runtime makes of a request: the command with its flags, the port, the probes. Pure.

A runtime is data (a Runtime message). `check` says what is wrong with one, `seed` are those that come with
Dure, `launch` applies one, or a model definition, and the request's overrides.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

import tomli
from google.protobuf import duration_pb2, json_format

from dure.definitions.environ import too_large, wrong_variable
from dure.definitions.model import DEFAULT_SHELL, SECONDS_MAX, is_http_path, reserved_port, takes_literal_port
from dure.fleet.v1 import fleet_pb2
from dure.v1 import catalog_pb2, endpoint_pb2
from dure.wire import names
from dure.wire.errors import InvalidInput, Violation
from dure.wire.quantities import MILLI, SHARES, parse_slots

FIRST_GGUF = "{first_gguf}"
FLAGS_MAX = 100
COMMAND_BYTES_MAX = 256 * 1024
# What a health check that nobody gave more than a path has, as in a model definition.
_DEFAULT_CHECK = fleet_pb2.HealthCheck(
    interval_ms=10_000,
    max_retries=10,
    max_wait_time_ms=15_000,
    expected_status_code=200,
    initial_delay_ms=60_000,
)
_FLAG = re.compile(r"--?[A-Za-z0-9][\w.-]*", re.ASCII)


def seed(text: str) -> list[catalog_pb2.Runtime]:
    """Runtimes of a seed file; it comes with the program, so that a mistake in it is a bug."""
    runtimes = []
    for name, value in tomli.loads(text).items():
        runtime = json_format.ParseDict(value, catalog_pb2.Runtime())
        runtime.name, runtime.builtin = f"runtimes/{name}", True
        runtimes.append(runtime)
    return runtimes


def check(runtime: catalog_pb2.Runtime, runtime_id: str) -> list[Violation]:
    """Everything that is wrong with a runtime that somebody wants to add."""
    violations = []
    wrong = names.check_id(runtime_id, names.ENDPOINT_ID, "runtime_id")
    violations += [wrong] if wrong is not None else []
    if runtime.port:
        violations += _check_port(runtime.port, "runtime.port")
    if runtime.HasField("start_command"):
        violations += _check_command(runtime.start_command, "runtime.start_command")
    if runtime.reads_model_definition and (
        runtime.port or runtime.HasField("start_command") or runtime.HasField("health_check")
    ):
        clash = "the model definition says command, port and health check: leave them out"
        violations.append(Violation("runtime.reads_model_definition", clash))
    if runtime.HasField("health_check"):
        violations += _check_probing(from_runtime(runtime.health_check), "runtime.health_check", runtime=True)
    if len(runtime.flags) > FLAGS_MAX:
        violations.append(Violation("runtime.flags", f"expected at most {FLAGS_MAX}"))
    for index, flag in enumerate(runtime.flags):
        if wrong_variable(flag.variable, ""):
            found = f"`{flag.variable[:60]}` {wrong_variable(flag.variable, '')}"
            violations.append(Violation(f"runtime.flags[{index}].variable", found))
        if flag.flag and not _FLAG.fullmatch(flag.flag):
            violations.append(Violation(f"runtime.flags[{index}].flag", _no_flag(flag.flag)))
    if runtime.gpu_fraction_flag and not _FLAG.fullmatch(runtime.gpu_fraction_flag):
        violations.append(Violation("runtime.gpu_fraction_flag", _no_flag(runtime.gpu_fraction_flag)))
    for variable, value in runtime.environ.items():
        if bad := wrong_variable(variable, value):
            violations.append(Violation(f"runtime.environ[{variable[:60]}]", bad))
    if bad := too_large(runtime.environ.items()):
        violations.append(Violation("runtime.environ", bad))
    try:
        parse_slots(runtime.resource_slots, "runtime.resource_slots")
    except InvalidInput as error:
        violations.extend(error.violations)
    return violations


def check_override(override: endpoint_pb2.ServiceOverride) -> list[Violation]:
    """Everything that is wrong with what a request says in place of a runtime, whichever it is."""
    field = "endpoint.service"
    violations = []
    if override.HasField("start_command"):
        violations += _check_command(override.start_command, f"{field}.start_command")
    if override.port:
        violations += _check_port(override.port, f"{field}.port")
    if override.health_check.disabled:
        if override.health_check != endpoint_pb2.HealthCheckOverride(disabled=True):
            alone = "excludes all other fields of the health check"
            violations.append(Violation(f"{field}.health_check.disabled", alone))
    elif override.HasField("health_check"):
        probing = fleet_pb2.HealthCheck(path="/")
        probing.MergeFrom(_DEFAULT_CHECK)
        _put_over(probing, override.health_check)
        violations += _check_probing(probing, f"{field}.health_check")
    return violations


def launch(
    runtime: catalog_pb2.Runtime,
    definition: fleet_pb2.KernelSpec | None,
    override: endpoint_pb2.ServiceOverride,
    environ: Mapping[str, str],
    slots: Mapping[str, int],
    target: str,
    ggufs: Sequence[str],
    violations: list[Violation],
) -> fleet_pb2.KernelSpec:
    """A template with command, actions, port and probes. `override` is right, as far as it goes.

    `definition` is the model definition's template for a runtime that reads one. `environ` and `slots` are
    the merged ones, `target` is where the model folder appears, `ggufs` its `*.gguf` files, the first one
    first.
    """
    kernel = fleet_pb2.KernelSpec()
    if definition is not None:
        kernel.CopyFrom(definition)
    else:
        kernel.command.model_path = target
        kernel.port = runtime.port
        if runtime.HasField("health_check"):
            kernel.health_check.CopyFrom(from_runtime(runtime.health_check))
    kernel.serial_start = runtime.serial_start
    runtime_id = runtime.name.rsplit("/", 1)[-1]
    if override.HasField("start_command"):
        _set_command(kernel.command, override.start_command)
    elif definition is None and runtime.HasField("start_command"):
        _set_command(kernel.command, runtime.start_command)
        _add_flags(kernel.command, _flags(runtime, environ, violations))
        _add_fraction(kernel.command, runtime.gpu_fraction_flag, slots)
    if definition is None or override.HasField("start_command"):
        _fill_gguf(kernel.command, ggufs, violations)
    if override.port:
        kernel.port = override.port
    elif not kernel.port and not runtime.reads_model_definition:
        say = f"is required: the runtime `{runtime_id}` leaves it to the request"
        violations.append(Violation("endpoint.service.port", say))
    if override.HasField("health_check"):
        _override_check(kernel, override.health_check, runtime_id, violations)
    kernel.fixed_port = takes_literal_port(kernel.command, kernel.port)
    return kernel


def has_command(command: fleet_pb2.Command) -> bool:
    return command.WhichOneof("start") is not None


def shown_command(command: fleet_pb2.Command) -> endpoint_pb2.StartCommand | None:
    """The command as users see it; None for the image's own."""
    match command.WhichOneof("start"):
        case "argv":
            return endpoint_pb2.StartCommand(args=command.argv.args)
        case "shell":
            return endpoint_pb2.StartCommand(line=command.shell.line, shell=command.shell.shell)
    return None


def from_runtime(check: catalog_pb2.RuntimeHealthCheck) -> fleet_pb2.HealthCheck:
    """What is zero has its default, but for the delay."""
    default = _DEFAULT_CHECK
    return fleet_pb2.HealthCheck(
        path=check.path,
        interval_ms=_milliseconds(check.interval_s) or default.interval_ms,
        max_retries=check.max_retries or default.max_retries,
        max_wait_time_ms=_milliseconds(check.max_wait_time_s) or default.max_wait_time_ms,
        expected_status_code=check.expected_status_code or default.expected_status_code,
        initial_delay_ms=_milliseconds(check.initial_delay_s),
        probe_during_initial_delay=check.probe_during_initial_delay,
    )


def _milliseconds(seconds: float) -> int:
    # Beyond any bound, infinity and what is no number become one that is refused.
    return round(seconds * 1000) if abs(seconds) <= 10**9 else -1


def _flags(
    runtime: catalog_pb2.Runtime, environ: Mapping[str, str], violations: list[Violation]
) -> list[str]:
    """Words that variables turn into; one without a value turns into nothing."""
    extra: list[str] = []
    for flag in runtime.flags:
        if flag.flag or not environ.get(flag.variable, "").strip():
            continue
        try:
            extra += shlex.split(environ[flag.variable])
        except ValueError as error:
            wrong = f"cannot be split into arguments as a shell does: {error}"
            violations.append(Violation(f"endpoint.environ[{flag.variable}]", wrong.lower()))
    words: list[str] = []
    for flag in runtime.flags:
        value = environ.get(flag.variable, "").strip()
        if flag.flag and value and not _says(extra, flag.flag):
            words += [flag.flag, value]
    return words + extra


def _add_flags(command: fleet_pb2.Command, words: list[str]) -> None:
    if command.HasField("argv"):
        command.argv.args.extend(words)
    elif command.HasField("shell") and words:
        command.shell.line = f"{command.shell.line.rstrip()} {shlex.join(words)}"


def _add_fraction(command: fleet_pb2.Command, flag: str, slots: Mapping[str, int]) -> None:
    """A framework takes whole devices unless told otherwise: it gets the granted part of each. Portions of
    more than one share are equal to within a milli-share."""
    wanted = slots.get(SHARES, 0)
    share = wanted // -(-wanted // MILLI) if wanted else 0
    if not flag or not 0 < share < MILLI:
        return
    words = list(command.argv.args) or re.split(r"[\s;|&'\"]+", command.shell.line)
    if not _says(words, flag) and has_command(command):
        _add_flags(command, [flag, f"{share // 10 / 100:.2f}"])


def _says(words: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def _fill_gguf(command: fleet_pb2.Command, ggufs: Sequence[str], violations: list[Violation]) -> None:
    words = [*command.argv.args, command.shell.line]
    if not any(FIRST_GGUF in word for word in words):
        return
    if not ggufs:
        missing = "the folder has no `*.gguf` file; upload one: dure folder upload FOLDER FILE"
        violations.append(Violation("endpoint.model", missing))
        return
    for index, word in enumerate(command.argv.args):
        command.argv.args[index] = word.replace(FIRST_GGUF, ggufs[0])
    if command.HasField("shell"):
        command.shell.line = command.shell.line.replace(FIRST_GGUF, ggufs[0])


def _set_command(command: fleet_pb2.Command, start: endpoint_pb2.StartCommand) -> None:
    if start.args:
        command.argv.CopyFrom(fleet_pb2.Argv(args=start.args))
    else:
        command.shell.CopyFrom(fleet_pb2.Shell(shell=start.shell or DEFAULT_SHELL, line=start.line))


def _check_command(start: endpoint_pb2.StartCommand, field: str) -> list[Violation]:
    violations = []
    if start.args and start.line:
        violations.append(Violation(field, "has args and a line, expected one of them"))
    elif not start.args and not start.line.strip():
        violations.append(Violation(field, "must not be empty: give args or a line"))
    elif start.args and not start.args[0].strip():
        violations.append(Violation(f"{field}.args[0]", "must not be empty: it is the program"))
    if start.shell and (start.args or not start.shell.startswith("/")):
        violations.append(Violation(f"{field}.shell", "must be an absolute path, and goes with a line only"))
    if any("\0" in word for word in (*start.args, start.line, start.shell)):
        violations.append(Violation(field, "must not contain a NUL character"))
    if sum(len(word.encode()) for word in (*start.args, start.line)) > COMMAND_BYTES_MAX:
        violations.append(Violation(field, f"is longer than {COMMAND_BYTES_MAX // 1024} KiB"))
    return violations


def _check_port(port: int, field: str) -> list[Violation]:
    if not 1 <= port <= 65535:
        return [Violation(field, f"found {port}, expected 1 to 65535")]
    reserved = reserved_port(port)
    return [Violation(field, reserved)] if reserved else []


def _override_check(
    kernel: fleet_pb2.KernelSpec,
    override: endpoint_pb2.HealthCheckOverride,
    runtime_id: str,
    violations: list[Violation],
) -> None:
    if override.disabled:
        kernel.ClearField("health_check")
        return
    if not kernel.HasField("health_check"):
        if not override.HasField("path"):
            needed = f"is required: the runtime `{runtime_id}` has no health check of its own here"
            violations.append(Violation("endpoint.service.health_check.path", needed))
            return
        kernel.health_check.CopyFrom(_DEFAULT_CHECK)
    _put_over(kernel.health_check, override)


def _put_over(check: fleet_pb2.HealthCheck, override: endpoint_pb2.HealthCheckOverride) -> None:
    for described, value in override.ListFields():
        if isinstance(value, duration_pb2.Duration):
            # Bounded, since it goes into 64 bits: what is beyond any limit stays so.
            milliseconds = max(-1, min(-(-value.ToNanoseconds() // 1_000_000), 10**15))
            setattr(check, f"{described.name}_ms", milliseconds)
        elif described.name != "disabled":
            setattr(check, described.name, value)


def _check_probing(check: fleet_pb2.HealthCheck, field: str, *, runtime: bool = False) -> list[Violation]:
    unit = "_s" if runtime else ""
    violations = []
    if not is_http_path(check.path):
        found = f"found `{check.path[:80]}`, expected an HTTP path: it begins with `/` and has no spaces"
        violations.append(Violation(f"{field}.path", found))
    for name, value_ms, least in (
        ("interval", check.interval_ms, 1),
        ("max_wait_time", check.max_wait_time_ms, 1),
        ("initial_delay", check.initial_delay_ms, 0),
    ):
        if not least <= value_ms <= SECONDS_MAX * 1000:
            expected = f"expected seconds, {'more than 0' if least else '0 or more'}, at most {SECONDS_MAX}"
            violations.append(Violation(f"{field}.{name}{unit}", f"found {value_ms / 1000:g}, {expected}"))
    if not 1 <= check.max_retries <= 1_000_000:
        found = f"found {check.max_retries}, expected 1 or more, at most 1000000"
        violations.append(Violation(f"{field}.max_retries", found))
    if not 100 <= check.expected_status_code <= 599:
        found = f"found {check.expected_status_code}, expected 100 to 599"
        violations.append(Violation(f"{field}.expected_status_code", found))
    return violations


def _no_flag(text: str) -> str:
    return f"`{text[:60]}` is not a flag such as `--tensor-parallel-size`"
