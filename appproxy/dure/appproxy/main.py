"""`dure proxy`: settings, and the life of the process."""

from __future__ import annotations

import ipaddress
import re
import signal
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import uvloop
from click.core import ParameterSource

from dure.appproxy.live import Limits
from dure.appproxy.serve import Settings, serve
from dure.wire import identity, logs, names
from dure.wire.errors import DureError
from dure.wire.programs import proxy_dir, recorded_members, running
from dure.wire.settings import CONTEXT_SETTINGS, apply_recorded, default_data_dir, write_toml

_SECRET = frozenset(("join_token",))
_NOT_RECORDED = _SECRET | {"data_dir", "name"}


def _data_dir(context: click.Context, _: click.Parameter, value: Path) -> Path:
    context.meta["dure.data_dir"] = value
    _take_up_recorded(context)
    return value


def _name(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    context.meta["dure.name"] = value
    _take_up_recorded(context)
    return value


def _take_up_recorded(context: click.Context) -> None:
    """Once folder and name are known, in whichever order they came."""
    meta = context.meta
    if "dure.data_dir" in meta and "dure.name" in meta and not context.resilient_parsing:
        name = _proxy_name(meta["dure.data_dir"], meta["dure.name"])
        apply_recorded(context, proxy_dir(meta["dure.data_dir"], name) / "settings.toml")


def _proxy_name(data_dir: Path, given: str | None) -> str:
    """The given name, or that of the only proxy that has lived in the folder, or `proxy-1`."""
    if given is not None:
        violation = names.check_id(given, names.MEMBER_ID, "--name")
        if violation is not None:
            raise click.UsageError(f"{violation.field}: {violation.description}")
        return given
    recorded = recorded_members(data_dir, "proxies")
    if len(recorded) > 1:
        raise click.UsageError(
            f"{data_dir} holds several proxies: choose one with --name ({', '.join(recorded)})"
        )
    return recorded[0] if recorded else "proxy-1"


def _ports(_: click.Context, __: click.Parameter, value: str) -> str:
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 65535:
        raise click.BadParameter(f"`{value}` is not a range of ports; write one such as 7100-7199")
    if int(match[2]) - int(match[1]) >= 10_000:
        raise click.BadParameter(f"`{value}` has more than 10000 ports")
    return value


def _address(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        if value == "localhost":
            return "127.0.0.1"
        raise click.BadParameter(f"`{value}` is not an IP address; 0.0.0.0 or :: means all") from None


def _host_port(_: click.Context, __: click.Parameter, value: str) -> str:
    host, _colon, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise click.BadParameter(f"`{value}` is not HOST:PORT, such as 127.0.0.1:7070")
    return value


def _domain(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,180}[A-Za-z0-9])?", value):
        raise click.BadParameter(f"`{value}` is not a domain, such as apps.example.org")
    return value.lower() if value is not None else None


_DEFAULTS = Limits()
_seconds = click.FloatRange(min=0.001, max=86_400)


@click.command(context_settings={**CONTEXT_SETTINGS, "show_default": True})
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_data_dir,
    callback=_data_dir,
    is_eager=True,
    help="Folder of all state.",
)
@click.option(
    "--name", callback=_name, is_eager=True, help="This proxy's name; proxy-1 unless one is recorded."
)
@click.option("--manager", default="127.0.0.1:7070", callback=_host_port, help="host:port.")
@click.option("--join-token", help="Needed once, for the first join; kept is what it is exchanged for.")
@click.option("--proxy-group", default="default")
@click.option("--bind", default="127.0.0.1", callback=_address, help="Where users connect.")
@click.option("--public-host", help="Host name under which users reach this proxy.")
@click.option("--ports", default="7100-7199", callback=_ports, help="Pool of endpoint ports.")
@click.option(
    "--domain", callback=_domain, help="Serve LABEL.DOMAIN on --port instead of a port per endpoint."
)
@click.option("--port", type=click.IntRange(1, 65535), default=7100, help="With --domain.")
@click.option("--admin-bind", default="127.0.0.1", callback=_address)
@click.option("--admin-port", type=click.IntRange(0, 65535), default=7099, help="0: any free.")
@click.option("--queue-size", type=click.IntRange(0, 100_000), default=_DEFAULTS.queue_size)
@click.option(
    "--held-requests",
    type=click.IntRange(1, 100_000),
    default=_DEFAULTS.held_requests,
    help="Most requests that wait for an endpoint at zero.",
)
@click.option("--queue-wait-s", type=_seconds, default=_DEFAULTS.queue_wait_s)
@click.option(
    "--requests-per-replica",
    type=click.IntRange(1, 1_000_000),
    default=_DEFAULTS.requests_per_replica,
    help="Most requests under way at one replica; more wait.",
)
@click.option("--first-byte-timeout-s", type=_seconds, default=_DEFAULTS.first_byte_timeout_s)
@click.option("--body-bytes-max", type=click.IntRange(0), default=_DEFAULTS.body_bytes_max)
@click.option(
    "--head-bytes-max",
    type=click.IntRange(1024, 1 << 20),
    default=_DEFAULTS.head_bytes_max,
)
@click.option("--insecure", is_flag=True, help="Allow --bind to more than loopback, though it has no TLS.")
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error"), case_sensitive=False),
    default="info",
)
@click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path))
@click.version_option(version("dure"), prog_name="dure proxy")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Forwards users' requests to the replicas of endpoints, by the manager's route table."""
    data_dir: Path = options["data_dir"].absolute()
    name = _proxy_name(data_dir, options["name"])
    home = proxy_dir(data_dir, name)
    if _explicit(context, "ports") and options["domain"] is not None:
        if _explicit(context, "domain"):
            raise click.UsageError("--ports and --domain exclude each other")
        options["domain"] = None
    for option in ("bind", "admin_bind"):
        if not ipaddress.ip_address(options[option]).is_loopback and not options["insecure"]:
            raise click.UsageError(
                f"--{option.replace('_', '-')} {options[option]} is open to the network, without TLS: "
                "bind to loopback behind a TLS proxy, or accept it with --insecure"
            )
    if identity.load(home) is None and not options["join_token"]:
        raise click.UsageError(
            f"{name} has not joined a manager yet: give --join-token (or DURE_JOIN_TOKEN) this once"
        )
    logs.set_up(options["log_level"], options["log_file"])
    settings = _settings(options, name, home)
    try:
        with running(data_dir, name, home):
            uvloop.run(serve(settings, lambda admin_port: _record(home, options, admin_port)))
    except DureError as error:
        raise click.ClickException(error.message) from error


def _explicit(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _settings(options: dict[str, Any], name: str, home: Path) -> Settings:
    loopback = ipaddress.ip_address(options["bind"]).is_loopback
    first, _, last = options["ports"].partition("-")
    return Settings(
        name=name,
        home=home,
        version=version("dure"),
        manager=options["manager"],
        join_token=options["join_token"],
        proxy_group=options["proxy_group"],
        bind=options["bind"],
        public_host=options["public_host"] or ("127.0.0.1" if loopback else socket.gethostname()),
        ports=(int(first), int(last)),
        domain=options["domain"],
        port=options["port"],
        admin_bind=options["admin_bind"],
        admin_port=options["admin_port"],
        stop_signals=(signal.SIGTERM, signal.SIGINT),
        limits=Limits(
            queue_size=options["queue_size"],
            held_requests=options["held_requests"],
            queue_wait_s=options["queue_wait_s"],
            requests_per_replica=options["requests_per_replica"],
            first_byte_timeout_s=options["first_byte_timeout_s"],
            body_bytes_max=options["body_bytes_max"],
            head_bytes_max=options["head_bytes_max"],
        ),
    )


def _record(home: Path, options: dict[str, Any], admin_port: int) -> None:
    """Keeps the settings, so that a start with the same data folder takes them up."""
    kept = {key: value for key, value in options.items() if key not in _NOT_RECORDED and value is not None}
    kept |= {"admin_port": admin_port}
    if "log_file" in kept:
        kept["log_file"] = str(kept["log_file"].absolute())
    write_toml(home / "settings.toml", kept)
