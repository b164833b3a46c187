"""What a runtime and a request's overrides come to."""

import math
from importlib import resources

import pytest

from dure.definitions.service import BUILTIN_RUNTIMES
from dure.fleet.v1 import fleet_pb2
from dure.manager import runtimes
from dure.v1 import catalog_pb2
from dure.v1.endpoint_pb2 import HealthCheckOverride, ServiceOverride, StartCommand
from dure.wire.errors import Violation

SEED = {
    runtime.name.removeprefix("runtimes/"): runtime
    for runtime in runtimes.seed(resources.files("dure.manager").joinpath("runtimes.toml").read_text())
}


def launched(
    name: str,
    environ: dict[str, str] | None = None,
    slots: dict[str, int] | None = None,
    override: ServiceOverride | None = None,
    ggufs: tuple[str, ...] = (),
    definition: fleet_pb2.KernelSpec | None = None,
) -> tuple[fleet_pb2.KernelSpec, list[Violation]]:
    violations: list[Violation] = []
    kernel = runtimes.launch(
        SEED[name],
        definition,
        override or ServiceOverride(),
        environ or {},
        slots or {},
        "/models",
        ggufs,
        violations,
    )
    return kernel, violations


def words(name: str, environ: dict[str, str] | None = None, slots: dict[str, int] | None = None) -> str:
    kernel, violations = launched(name, environ, slots, ggufs=("b.gguf",))
    assert not violations
    return " ".join(kernel.command.argv.args)


def test_the_table_of_runtimes() -> None:
    assert tuple(SEED) == BUILTIN_RUNTIMES
    found = {
        name: (runtime.port, runtime.health_check.path, runtime.reads_model_definition)
        for name, runtime in SEED.items()
    }
    assert found == {
        "vllm": (8000, "/health", False),
        "sglang": (9001, "/health", False),
        "nim": (8000, "/v1/health/ready", False),
        "huggingface-tgi": (3000, "/info", False),
        "llama-cpp": (8080, "/health", False),
        "modular-max": (8000, "/health", False),
        "cmd": (0, "", False),
        "custom": (0, "", True),
    }
    assert words("vllm") == "vllm serve {model_path} --host 0.0.0.0 --port {port}"
    assert words("sglang") == (
        "python -m sglang.launch_server --model-path {model_path} --host 0.0.0.0 --port {port}"
    )
    assert words("huggingface-tgi") == (
        "text-generation-launcher --model-id {model_path} --hostname 0.0.0.0 --port {port}"
    )
    assert words("llama-cpp") == (
        "llama-server --host 0.0.0.0 --port {port} --metrics -m {model_path}/b.gguf"
    )
    assert words("modular-max") == "max serve --model {model_path} --host 0.0.0.0 --port {port}"
    for name in ("vllm", "sglang", "nim", "huggingface-tgi", "llama-cpp", "modular-max"):
        check = launched(name, ggufs=("x",))[0].health_check
        assert (check.interval_ms, check.max_retries, check.initial_delay_ms) == (10_000, 10, 1_800_000)
        assert (check.max_wait_time_ms, check.expected_status_code) == (15_000, 200)
        assert check.probe_during_initial_delay
        assert not runtimes.check(SEED[name], name)
    for name in ("nim", "cmd"):
        assert not runtimes.has_command(launched(name)[0].command)


@pytest.mark.parametrize(
    ("runtime", "environ", "ends"),
    [
        ("vllm", {"VLLM_TP_SIZE": "2"}, "{port} --tensor-parallel-size 2"),
        (
            "vllm",
            {"VLLM_QUANTIZATION": "awq", "VLLM_PP_SIZE": "3", "VLLM_TP_SIZE": ""},
            "{port} --pipeline-parallel-size 3 --quantization awq",
        ),
        ("vllm", {"VLLM_EXTRA_ARGS": "--a 'b c' -d"}, "{port} --a b c -d"),
        (
            "vllm",
            {"VLLM_EXTRA_ARGS": "--tensor-parallel-size=4", "VLLM_TP_SIZE": "2"},
            "{port} --tensor-parallel-size=4",
        ),
        ("vllm", {"SGLANG_TP_SIZE": "2"}, "--port {port}"),
        (
            "sglang",
            {"SGLANG_TP_SIZE": "2", "SGLANG_PP_SIZE": "3", "SGLANG_QUANTIZATION": "fp8"},
            "{port} --tp-size 2 --pp-size 3 --quantization fp8",
        ),
        ("sglang", {"SGLANG_EXTRA_ARGS": "--x y"}, "{port} --x y"),
    ],
)
def test_variables_turn_into_flags(runtime: str, environ: dict[str, str], ends: str) -> None:
    assert words(runtime, environ).endswith(ends)


def test_extra_arguments_that_no_shell_would_take() -> None:
    (violation,) = launched("vllm", {"VLLM_EXTRA_ARGS": "--a 'b"})[1]
    assert violation.field == "endpoint.environ[VLLM_EXTRA_ARGS]"
    assert violation.description == "cannot be split into arguments as a shell does: no closing quotation"


@pytest.mark.parametrize(
    ("share", "environ", "ends"),
    [
        (250, {}, "--gpu-memory-utilization 0.25"),
        (10, {}, "--gpu-memory-utilization 0.01"),
        (1000, {}, "--port {port}"),
        (1500, {}, "--gpu-memory-utilization 0.75"),
        (2500, {}, "--gpu-memory-utilization 0.83"),
        (1010, {}, "--gpu-memory-utilization 0.50"),
        (3000, {}, "--port {port}"),
        (500, {"VLLM_EXTRA_ARGS": "--gpu-memory-utilization 0.9"}, "--gpu-memory-utilization 0.9"),
        (500, {"VLLM_EXTRA_ARGS": "--gpu-memory-utilization=0.9"}, "--gpu-memory-utilization=0.9"),
        (500, {"VLLM_TP_SIZE": "1"}, "--tensor-parallel-size 1 --gpu-memory-utilization 0.50"),
    ],
)
def test_the_memory_of_a_fraction_of_a_gpu(share: int, environ: dict[str, str], ends: str) -> None:
    assert words("vllm", environ, {"cuda.shares": share}).endswith(ends)


def test_the_memory_of_sglang_follows_its_share() -> None:
    assert words("sglang", {}, {"cuda.shares": 400}).endswith("--mem-fraction-static 0.40")
    assert words("sglang", {}, {"cuda.shares": 1500}).endswith("--mem-fraction-static 0.75")
    given = {"SGLANG_EXTRA_ARGS": "--mem-fraction-static 0.3"}
    assert words("sglang", given, {"cuda.shares": 400}).endswith("--mem-fraction-static 0.3")
    assert words("sglang", {}, {"cuda.device": 1000}).endswith("--port {port}")


def test_starts_are_serial_where_each_measures_what_is_free() -> None:
    serial = {name for name in SEED if name != "custom" and launched(name, ggufs=("a",))[0].serial_start}
    assert serial == {"vllm", "sglang"}


def test_a_command_of_the_request_is_left_as_it_is() -> None:
    override = ServiceOverride(start_command=StartCommand(args=["serve", "9000"]), port=9000)
    kernel, violations = launched("vllm", {"VLLM_TP_SIZE": "2"}, {"cuda.shares": 500}, override)
    assert not violations
    assert list(kernel.command.argv.args) == ["serve", "9000"]
    assert (kernel.port, kernel.fixed_port) == (9000, True)
    line = ServiceOverride(start_command=StartCommand(line="serve {port}"))
    kernel, _ = launched("vllm", override=line)
    assert (kernel.command.shell.line, kernel.command.shell.shell) == ("serve {port}", "/bin/bash")
    assert (kernel.port, kernel.fixed_port) == (8000, False)


def test_a_port_of_the_request_decides_whether_the_command_names_it() -> None:
    definition = fleet_pb2.KernelSpec(port=8000, fixed_port=True)
    definition.command.argv.args.extend(["serve", "8000"])
    kernel, _ = launched("custom", override=ServiceOverride(port=8001), definition=definition)
    assert (kernel.port, kernel.fixed_port) == (8001, False)
    kernel, _ = launched("custom", definition=definition)
    assert (kernel.port, kernel.fixed_port) == (8000, True)


def test_what_the_image_alone_knows_is_asked_for() -> None:
    kernel, violations = launched(
        "cmd", override=ServiceOverride(health_check=HealthCheckOverride(max_retries=3))
    )
    assert [violation.field for violation in violations] == [
        "endpoint.service.port",
        "endpoint.service.health_check.path",
    ]
    kernel, violations = launched(
        "cmd", override=ServiceOverride(port=80, health_check=HealthCheckOverride(path="/up", max_retries=3))
    )
    assert not violations
    check = kernel.health_check
    assert (check.path, check.max_retries, check.interval_ms, check.initial_delay_ms) == (
        "/up",
        3,
        10_000,
        60_000,
    )


def test_parts_of_a_health_check_are_overridden() -> None:
    override = HealthCheckOverride(expected_status_code=204, probe_during_initial_delay=False)
    override.interval.FromMilliseconds(500)
    override.initial_delay.FromNanoseconds(1)
    check = launched("vllm", override=ServiceOverride(health_check=override))[0].health_check
    assert (check.path, check.interval_ms, check.initial_delay_ms) == ("/health", 500, 1)
    assert (check.expected_status_code, check.probe_during_initial_delay) == (204, False)
    off = ServiceOverride(health_check=HealthCheckOverride(disabled=True))
    assert not launched("vllm", override=off)[0].HasField("health_check")


def test_no_gguf_in_the_folder() -> None:
    (violation,) = launched("llama-cpp")[1]
    assert violation.field == "endpoint.model"
    assert "no `*.gguf` file" in violation.description


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (ServiceOverride(start_command=StartCommand()), "start_command"),
        (ServiceOverride(start_command=StartCommand(args=["a"], line="a")), "start_command"),
        (ServiceOverride(start_command=StartCommand(args=[" "])), "start_command.args[0]"),
        (ServiceOverride(start_command=StartCommand(line="a\0")), "start_command"),
        (ServiceOverride(start_command=StartCommand(line="a", shell="sh")), "start_command.shell"),
        (ServiceOverride(port=2200), "port"),
        (ServiceOverride(port=70000), "port"),
        (ServiceOverride(port=-1), "port"),
        (ServiceOverride(health_check=HealthCheckOverride(path="up")), "health_check.path"),
        (ServiceOverride(health_check=HealthCheckOverride(max_retries=0)), "health_check.max_retries"),
        (
            ServiceOverride(health_check=HealthCheckOverride(expected_status_code=99)),
            "health_check.expected_status_code",
        ),
        (
            ServiceOverride(health_check=HealthCheckOverride(disabled=True, path="/a")),
            "health_check.disabled",
        ),
    ],
)
def test_bad_overrides(override: ServiceOverride, field: str) -> None:
    (violation,) = runtimes.check_override(override)
    assert violation.field == f"endpoint.service.{field}"


@pytest.mark.parametrize("seconds", [0.0, -5.0, 86401.0, 1e12])
def test_bad_intervals(seconds: float) -> None:
    override = HealthCheckOverride()
    override.interval.seconds = int(seconds)
    (violation,) = runtimes.check_override(ServiceOverride(health_check=override))
    assert violation.field == "endpoint.service.health_check.interval"


def test_everything_wrong_with_a_new_runtime() -> None:
    runtime = catalog_pb2.Runtime(
        start_command=StartCommand(args=["a"], line="b"),
        port=2001,
        health_check=catalog_pb2.RuntimeHealthCheck(path="x", interval_s=math.nan, initial_delay_s=math.inf),
        reads_model_definition=True,
        environ={"1": "x"},
        resource_slots={"gpu": "1"},
        flags=[catalog_pb2.RuntimeFlag(variable="A B", flag="x")],
        gpu_fraction_flag="y",
    )
    assert [violation.field for violation in runtimes.check(runtime, "Bad")] == [
        "runtime_id",
        "runtime.port",
        "runtime.start_command",
        "runtime.reads_model_definition",
        "runtime.health_check.path",
        "runtime.health_check.interval_s",
        "runtime.health_check.initial_delay_s",
        "runtime.flags[0].variable",
        "runtime.flags[0].flag",
        "runtime.gpu_fraction_flag",
        "runtime.environ[1]",
        "runtime.resource_slots[gpu]",
    ]
