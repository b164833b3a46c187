"""What went wrong, for people: the error, every violation on its own line, and the next command to try."""

from __future__ import annotations

import os
import re
import sys
import traceback

import click

from dure.client.cli import chat_hints
from dure.wire.errors import (
    AlreadyExists,
    Conflict,
    DureError,
    InternalError,
    InvalidInput,
    ManagerUnreachable,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)

# A violation of a definition file: `service-definition.toml:3: vllm.environ.PORT`.
_DEFINITION = re.compile(r"\S+\.(ya?ml|toml)(:|$)")
# Errors of waiting name their endpoint, which need not be the command's argument: `model run m --name e`.
_WAITING = ("WAIT_TIMED_OUT", "WAIT_FAILED", "ROLLED_BACK", "ROLLOUT_PAUSED", "ROLLOUT_WAITS")
_ENDPOINT = re.compile(r"\bendpoint ([a-z][a-z0-9-]*)\b")


def report(error: Exception, arguments: list[str]) -> int:
    """Tells the error on stderr and returns the exit code. `DURE_DEBUG=1` adds the stack trace."""
    if os.environ.get("DURE_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, DureError):
        lines, code = explain(error, arguments), error.exit_code
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        lines, code = [f"error: {where}{error.strerror or error}"], 1
    else:
        lines = [
            f"error: this is a bug in dure: {type(error).__name__}: {error}",
            "next: run it again with DURE_DEBUG=1 set, and report what it prints",
        ]
        code = 1
    for line in lines:
        click.echo(line, err=True)
    return code


def explain(error: DureError, arguments: list[str]) -> list[str]:
    """The lines to print for an error of the command `arguments`."""
    if isinstance(error, InvalidInput) and (count := len(error.violations)):
        lines = [f"error: {count} problem{'s' if count > 1 else ''} with the input:"]
        lines += [f"  {violation.field}: {violation.description}" for violation in error.violations]
    else:
        lines = [f"error: {error.message}"]
    hint = _next(error, arguments)
    return [*lines, f"next: {hint}"] if hint else lines


def _next(error: DureError, arguments: list[str]) -> str:
    words = [argument for argument in arguments if not argument.startswith("-")]
    group, verb, name = [*words, "", "", ""][:3]
    if group == "chat":  # a command, not a group
        verb, name = "", verb or "NAME"
    if (group, verb) == ("endpoint", "rollout"):
        name = [*words, "", "", "", ""][3]
    elif group == "apply":
        name = "NAME"
    if error.reason in _WAITING and (found := _ENDPOINT.search(error.message)) is not None:
        name = found[1]
    match error.reason:
        case "NO_CONTEXT":
            return (
                "`dure dev` starts a cluster on this machine and writes one; "
                "`dure context set --manager HOST:PORT --api-key KEY` names another"
            )
        case "BAD_CONTEXT":
            return "mend the file, or write it anew with `dure context set --manager HOST:PORT --api-key KEY`"
        case "WAIT_TIMED_OUT":
            return f"`dure endpoint get {name}` shows what it waits for; `dure endpoint wait {name}` waits on"
        case "ROLLED_BACK":
            return f"`dure endpoint events {name}` says why, `dure endpoint history {name}` what changed"
        case "ROLLOUT_PAUSED":
            return f"`dure endpoint rollout resume {name}` goes on, `dure endpoint rollback {name}` goes back"
        case "ROLLOUT_WAITS":
            return f"`dure endpoint rollout resume {name}` takes the next step, `promote` all that are left"
        case "DRAIN_TIMED_OUT":
            return f"`dure agent get {name} -w` waits on; `dure agent resume {name}` takes it back"
        case "KEY_NOT_FOUND":
            return "`dure key list` shows the keys"
        case "MEMBER_NOT_FOUND":
            return f"`dure user get {words[3] if len(words) > 3 else 'USER'}` shows the user's projects"
        case "WAIT_FAILED":
            return (
                f"`dure endpoint events {name}` says what happened; "
                f"when it is mended, `dure endpoint retry {name} --wait`"
            )
        case reason if reason in chat_hints.NEXT:
            return chat_hints.NEXT[reason]
    match error:
        case ManagerUnreachable():
            return (
                "`dure doctor` says what is wrong; `dure context show` which manager it is; "
                "`dure dev` starts a cluster on this machine"
            )
        case PermissionDenied():
            return "`dure user whoami` says who you are and what your key allows"
        case Unauthenticated():
            return (
                "`dure context show` says which API key is used; `dure context set --api-key KEY` changes it"
            )
        case NotFound():
            if group == "apply" or (group == "endpoint" and verb in ("create", "validate")):
                return "`dure folder list` shows the folders"
            if group == "folder" and verb in ("ls", "rm", "download") and "has nothing at" in error.message:
                return f"`dure folder ls {name}` shows the files"
            if group == "folder":
                return (
                    "`dure folder list` shows the folders; `dure folder create NAME --usage model` makes one"
                )
            if group == "token" and verb in ("get", "show", "revoke"):
                return "`dure token list ENDPOINT` shows the tokens"
            if group == "rule" and "rule" in error.message:
                return f"`dure rule list {name}` shows the rules"
            if "revision" in error.message:
                return f"`dure endpoint history {name}` shows the revisions"
            if group in ("endpoint", "token", "chat", "rule"):
                return "`dure endpoint list` shows the endpoints"
            if group in ("model", "runtime"):
                return f"`dure {group} list` shows the {group}s"
            return "`dure agent list` shows the agents" if group == "agent" else ""
        case AlreadyExists() if (group, verb) == ("model", "run"):
            return "`dure endpoint list` shows what has the name; --name gives another one"
        case AlreadyExists() if group == "rule":
            return f"`dure rule list {name}` shows the rules; choose another --name, or `dure rule update`"
        case AlreadyExists():
            shown = f"dure {group} get {name}" if group == "endpoint" else f"dure {group} list"
            return f"`{shown}` shows what has the name; choose another one"
        case Conflict():
            return "read it again, and repeat the command if it is still right"
        case InternalError():
            return "the manager's log says more"
        case InvalidInput(violations=wrong) if group in ("endpoint", "model") and any(
            _DEFINITION.match(violation.field) for violation in wrong
        ):
            return "mend the files and upload them again; `dure folder check FOLDER|DIR` checks them before"
        case InvalidInput() if (group, verb) == ("rule", "simulate"):
            return "mend the file; docs/scaling.md says what it holds"
        case InvalidInput() if group == "apply":
            return "mend the file; `dure apply --dry-run -f FILE` checks it again"
        case InvalidInput() if verb:
            return f"`dure {group} {verb} --help` says what is expected"
    return ""
