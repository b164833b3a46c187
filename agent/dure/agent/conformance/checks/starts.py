"""How a kernel is started: command, templates, variables, home, actions, ports, security."""

from __future__ import annotations

import socket

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import NotApplicable, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_STRICT = fleet_pb2.SECURITY_PROFILE_STRICT


@check("6.1")
async def argv_as_it_is(stage: Stage) -> None:
    """A command as a list is executed as it is: nothing is split, expanded or quoted."""
    status = await stage.healthy(stage.spec([*specs.SERVE, "a b", "$HOME", "*", "", "{unknown}"]))
    argv = (await stage.ask(status))["argv"]
    demand(argv == ["a b", "$HOME", "*", "", "{unknown}"], "the arguments of the spec", argv)


@check("6.1")
async def shell_line(stage: Stage) -> None:
    """A line goes to the shell of the spec, and the shell's own braces stay."""
    lines = await stage.lines('X=1; echo one | cat; echo "${X}" \'{"a": 2}\'')
    demand(lines == ["one", '1 {"a": 2}'], "what a shell makes of the line", lines)


@check("6.1")
async def working_directory(stage: Stage) -> None:
    """The command starts in its model_path."""
    status = await stage.healthy(stage.spec())
    seen = await stage.ask(status)
    expected = specs.MODEL_TARGET if stage.hello.maps_mounts else seen["environ"].get("BACKEND_MODEL_PATH")
    demand(seen["cwd"] == expected, f"to start in {expected}", seen["cwd"])


@check("6.2")
async def templates(stage: Stage) -> None:
    """`{port}` and `{model_path}` are filled in, and $PORT is the same port."""
    status = await stage.healthy(stage.spec([*specs.SERVE, "--port={port}", "{model_path}/x", "{left}"]))
    seen = await stage.ask(status)
    port = seen["environ"].get("PORT", "")
    place = specs.MODEL_TARGET if stage.hello.maps_mounts else seen["cwd"]
    expected = [f"--port={port}", f"{place}/x", "{left}"]
    demand(port.isdecimal(), "a number as $PORT", f"`{port}`")
    demand(seen["argv"] == expected, f"the arguments {expected}", seen["argv"])


@check("6.2")
async def fixed_port(stage: Stage) -> None:
    """A kernel with fixed_port binds the very port that its definition declares."""
    port = free_port()
    status = await stage.healthy(stage.spec([*specs.SERVE, "{port}"], port=port, fixed_port=True))
    seen = await stage.ask(status)
    demand(
        seen["argv"] == [str(port)] and seen["environ"].get("PORT") == str(port),
        f"port {port} in the kernel",
        f"{seen['argv']}, PORT={seen['environ'].get('PORT')}",
    )


@check("6.3")
async def variables(stage: Stage) -> None:
    """The variables of the spec and those of the session are there; the agent's secrets are not."""
    spec = stage.spec(environ={"GREETING": "hello world", "BACKEND_MODEL_NAME": "mine"})
    environ = (await stage.ask(await stage.healthy(spec)))["environ"]
    expected = {
        "GREETING": "hello world",
        # The user's own win.
        "BACKEND_MODEL_NAME": "mine",
        "BACKENDAI_SESSION_ID": spec.session_uid,
        "BACKENDAI_SESSION_NAME": spec.session_name,
        "BACKENDAI_KERNEL_ID": spec.uid,
        "BACKENDAI_KERNEL_IMAGE": spec.image,
        "BACKENDAI_CLUSTER_SIZE": "1",
        "BACKENDAI_CLUSTER_HOST": "main1",
        "BACKENDAI_CLUSTER_ROLE": "main",
        "GPU_COUNT": "0",
        "DURE_KERNEL_UID": spec.uid,
        "DURE_SESSION_UID": spec.session_uid,
        "DURE_REPLICA_UID": spec.replica_uid,
        "DURE_ENDPOINT": spec.endpoint,
        "DURE_PROJECT": spec.project,
    }
    wrong = {name: environ.get(name) for name, value in expected.items() if environ.get(name) != value}
    demand(not wrong, f"{ {name: expected[name] for name in wrong} }", wrong)
    demand("DURE_JOIN_TOKEN" not in environ, "no secret of the agent's", "DURE_JOIN_TOKEN")
    demand(environ.get("BACKEND_MODEL_PATH"), "BACKEND_MODEL_PATH", "it is not set")


@check("6.4")
async def private_home(stage: Stage) -> None:
    """HOME is writable and the kernel's own: /home/work where mounts are mapped."""
    line = 'ls -A "$HOME" | grep mine; echo x >"$HOME/mine" && cat "$HOME/mine"; echo "$HOME"; cd && pwd'
    for _ in range(2):
        lines = await stage.lines(line)
        if stage.hello.maps_mounts:
            demand(lines == ["x", "/home/work", "/home/work"], "an empty writable /home/work", lines)
        else:
            demand(len(lines) == 3 and lines[0] == "x", "an empty writable HOME", lines)


@check("6.5")
async def actions_in_order(stage: Stage) -> None:
    """Pre-start actions run in order before the command, and their results are filled in by ref."""
    actions = [
        _action(mkdir=fleet_pb2.Mkdir(path="/home/work/a/b", parents=True)),
        _action("made", run_command=fleet_pb2.RunCommand(command=["sh", "-c", "echo one; echo two >&2"])),
        _action(
            "file", write_tempfile=fleet_pb2.WriteTempfile(body="port {port}\n", mode=0o640, suffix=".x")
        ),
        _action(log=fleet_pb2.Log(message="said {made.out} {made.err} {made}")),
        _action(run_command=fleet_pb2.RunCommand(command=["false"], check=False)),
        _action(run_command=fleet_pb2.RunCommand(command=["echo", "echoed"], echo=True, check=True)),
    ]
    where = "/home/work" if stage.hello.maps_mounts else "{file}.d"
    actions[0].mkdir.path = f"{where}/a/b"
    if not stage.hello.maps_mounts:
        # Only a temporary file tells where the kernel may write.
        actions = [*actions[1:3], actions[0], *actions[3:]]
    write = fleet_pb2.WriteFile(filename=f"{where}/a/b/c", body="more", mode=0o600)
    actions += [
        _action("conf", write_file=write),
        _action(
            write_file=fleet_pb2.WriteFile(filename="{conf}", body=" and more\n", mode=0o600, append=True)
        ),
    ]
    lines = await stage.lines(
        "cat {conf}; cat {file}; case {file} in *.x) stat -c %a {file} {conf};; esac",
        pre_start_actions=actions,
    )
    demand(lines[:2] == ["said one two one", "echoed"], "the log of the actions first", lines)
    demand(lines[2] == "more and more", "the file that was written and appended to", lines)
    demand(lines[3].startswith("port ") and lines[3][5:].isdecimal(), "templates in a body", lines)
    demand(lines[4:] == ["640", "600"], "the modes and the suffix of the actions", lines)


@check("6.5")
async def failing_action(stage: Stage) -> None:
    """An action that fails stops the start: ACTION_FAILED, with its index, name and output."""
    fine = _action(log=fleet_pb2.Log(message="the first"))
    command = ["sh", "-c", "echo the reason >&2; exit 9"]
    broken = _action(run_command=fleet_pb2.RunCommand(command=command, check=True))
    spec = stage.spec("echo the command ran", pre_start_actions=[fine, broken])
    status = await stage.refused(spec, "ACTION_FAILED")
    message = status.exit.message
    for part in ("1", "run_command", "9", "the reason"):
        demand(part in message, f"`{part}` in the message (index from 0, name, code, output)", message)
    demand("the command ran" not in status.exit.log_tail, "the command not to run", status.exit.log_tail)
    demand("the first" in status.exit.log_tail, "the log of the action before", specs.told(status))


@check("6.7")
async def no_command(stage: Stage) -> None:
    """Where images are not run, a kernel without a command is refused with START_FAILED."""
    if stage.hello.runs_images:
        raise NotApplicable("the agent runs images, which have commands of their own")
    spec = stage.spec()
    spec.command.ClearField("argv")
    await stage.refused(spec, "START_FAILED")


@check("6.8")
async def strict_profile(stage: Stage) -> None:
    """STRICT means never the superuser, no capabilities, a root that is read-only; home stays writable."""
    if _STRICT not in stage.hello.security_profiles:
        raise NotApplicable("Hello does not name SECURITY_PROFILE_STRICT")
    line = (
        "id -u; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; "
        "touch /conformance 2>/dev/null && echo root is writable; "
        'touch "$HOME/x" /tmp/x && echo home is writable; cat {model_path}/weights.txt'
    )
    lines = await stage.lines(line, security_profile=_STRICT)
    demand(lines[0] != "0", "a user other than the superuser", f"uid {lines[0]}")
    found = dict(one.split(":", 1) for one in lines if ":" in one)
    effective = found.get("CapEff", "?").strip()
    demand(set(effective) == {"0"}, "no capabilities", effective)
    demand(found.get("NoNewPrivs", "1").strip() == "1", "no new privileges", found)
    demand("root is writable" not in lines, "a read-only root", "a file could be made in it")
    demand("home is writable" in lines, "a writable home and /tmp", lines)
    demand(lines[-1] == "weights", "the model folder", lines)


@check("6.8")
async def strict_is_not_left_out(stage: Stage) -> None:
    """An agent that cannot run kernels as STRICT refuses them with START_FAILED."""
    if _STRICT in stage.hello.security_profiles:
        raise NotApplicable("the agent has the profile")
    await stage.refused(stage.spec(security_profile=_STRICT), "START_FAILED")


@check("6.9")
async def missing_image(stage: Stage) -> None:
    """An image that is not on the node and must not be fetched: IMAGE_FAILED, with its name."""
    if not stage.hello.runs_images:
        raise NotApplicable("the agent runs no images")
    image = "conformance.invalid/no-such-image:none"
    spec = stage.spec(image=image, image_pull_policy=fleet_pb2.IMAGE_PULL_POLICY_NEVER)
    status = await stage.refused(spec, "IMAGE_FAILED")
    demand("no-such-image" in status.exit.message, "the image in the message", status.exit.message)


@check("6.9")
async def image_out_of_reach(stage: Stage) -> None:
    """A registry that does not answer: a credential is asked for, and the end is IMAGE_FAILED."""
    if not stage.hello.runs_images:
        raise NotApplicable("the agent runs no images")
    # Nobody listens there.
    image = "127.0.0.1:1/no-such-image:none"
    spec = stage.spec(image=image, image_pull_policy=fleet_pb2.IMAGE_PULL_POLICY_ALWAYS)
    status = await stage.refused(spec, "IMAGE_FAILED")
    demand("no-such-image" in status.exit.message, "the image in the message", status.exit.message)
    demand(spec.uid in stage.manager.credentials_asked, "GetImageCredential for the kernel", "no call")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _action(ref: str = "", **content: object) -> fleet_pb2.PreStartAction:
    return fleet_pb2.PreStartAction(ref=ref, **content)  # type: ignore[arg-type]


CHECKS = (
    argv_as_it_is,
    shell_line,
    working_directory,
    templates,
    fixed_port,
    variables,
    private_home,
    actions_in_order,
    failing_action,
    no_command,
    strict_profile,
    strict_is_not_left_out,
    missing_image,
    image_out_of_reach,
)
