"""`dure chat` as a program: without a terminal and in one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from link.chat.fake_model import SENTENCE, FakeModel, serving
from link.chat.terminal import Terminal, terminal
from link.client.fake_manager import FakeManager, fake_manager, until, write_context

from dure.v1 import token_pb2
from dure.v1.endpoint_pb2 import ENDPOINT_STATUS_HEALTHY, Endpoint

DURE = (sys.executable, "-m", "dure.client.cli.main")


@dataclass
class Ran:
    code: int
    out: str
    err: str


@dataclass
class World:
    """A manager with the endpoint `chat`, the model that it serves, and the command line."""

    fake: FakeManager
    model: FakeModel
    environ: dict[str, str]

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *DURE, *arguments, stdin=pipe, stdout=pipe, stderr=pipe, env=self.environ
        )

    async def dure(self, *arguments: str, stdin: str = "") -> Ran:
        process = await self.start(*arguments)
        out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        assert b"Traceback" not in err, err.decode()
        return Ran(process.returncode, out.decode(), err.decode())

    def terminal(self, *arguments: str) -> AbstractAsyncContextManager[Terminal]:
        return terminal(*DURE, *arguments, env=self.environ | {"TERM": "xterm"})

    def endpoint(self, **fields: object) -> Endpoint:
        endpoint = Endpoint(
            name="projects/default/endpoints/chat",
            uid="u",
            address=self.model.url + "/",
            replica_count=1,
            desired_replicas=1,
            ready_replicas=1,
            status=ENDPOINT_STATUS_HEALTHY,
        )
        for name, value in fields.items():
            setattr(endpoint, name, value)
        self.fake.endpoints[endpoint.name] = endpoint
        self.fake.touch(endpoint.name)
        return endpoint

    def statuses(self) -> list[str]:
        """Of all tokens that were ever issued."""
        return [
            token_pb2.TokenStatus.Name(token.status).removeprefix("TOKEN_STATUS_")
            for token in self.fake.tokens.values()
        ]


def with_world(
    tmp_path: Path, body: Callable[[World], Awaitable[None]], model: FakeModel | None = None
) -> None:
    async def run() -> None:
        async with asyncio.timeout(40), fake_manager() as fake, serving(model or FakeModel()) as served:
            environ = {
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "DURE_CONTEXT_FILE": str(write_context(fake, tmp_path)),
                "PYTHONUTF8": "1",
            }
            world = World(fake, served, environ)
            world.endpoint()
            await body(world)

    asyncio.run(run())


def test_one_question_with_a_token_of_its_own(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        options = ("--system", "Be brief.", "--temperature", "0", "--max-tokens", "9")
        ran = await world.dure("chat", "chat", "--message", "Why?", *options)
        assert (ran.code, ran.out) == (0, SENTENCE + "\n"), ran
        assert "\x1b" not in ran.out + ran.err and "tokens in" not in ran.err
        asked = world.model.asked[0]
        assert asked["model"] == "tiny" and (asked["temperature"], asked["max_tokens"]) == (0, 9)
        assert asked["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why?"},
        ]
        (token,) = world.fake.tokens.values()
        assert {seen for _, _, seen in world.model.seen} == {f"Bearer {token.secret}"}
        assert (
            token.label == "dure chat" and 0 < token.expire_time.seconds - token.create_time.seconds <= 3600
        )
        assert world.statuses() == ["REVOKED"]

    with_world(tmp_path, body)


def test_piped_questions_public_endpoints_and_given_tokens(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        piped = await world.dure("chat", "chat", "-v", "--token", "mine", stdin="Why,\nreally?\n")
        assert piped.out == SENTENCE + "\n" and "tiny: 7 tokens in" in piped.err
        assert world.model.asked[-1]["messages"][0]["content"] == "Why,\nreally?\n"
        assert world.model.seen[-1][2] == "Bearer mine"
        world.endpoint(open_to_public=True)
        quiet = await world.dure("chat", "chat", "-q", "-v", "--message", "-", stdin="x")
        assert (quiet.out, quiet.err) == (SENTENCE + "\n", "")
        assert world.model.seen[-1][2] == ""
        assert world.statuses() == []
        other = await world.dure("chat", "--base-url", world.model.url, "--model", "tiny", "-m", "x")
        assert other.code == 0 and len(world.model.asked) == 3
        world.environ["DURE_CHAT_TOKEN"] = "from-the-environment"
        await world.dure("chat", "--base-url", world.model.url + "/v1", "-m", "x")
        assert world.model.seen[-1][2] == "Bearer from-the-environment"

    with_world(tmp_path, body)


def test_it_waits_for_a_replica_or_says_why_there_is_none(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.fake.set("chat", "PENDING", ready=0, reason="no node has 1.00 cuda.shares free")
        waiting = await world.start("chat", "chat", "-m", "x")
        await until(lambda: world.fake.watches)
        world.fake.set("chat", "HEALTHY")
        out, err = await waiting.communicate()
        assert waiting.returncode == 0 and out.decode() == SENTENCE + "\n"
        assert "no node has" in err.decode()
        # One of two is enough.
        world.endpoint(desired_replicas=2)
        world.fake.set("chat", "DEGRADED", ready=1)
        assert (await world.dure("chat", "chat", "-m", "x")).code == 0
        for status, code, says in (
            ("STOPPED", 1, "dure endpoint scale NAME 1"),
            ("BLOCKED", 1, "dure endpoint retry chat"),
            ("PENDING", 6, "no node has room"),
            ("UNHEALTHY", 6, "no node has room"),
        ):
            world.fake.set("chat", status, ready=0, reason="no node has room")
            ran = await world.dure("chat", "chat", "-m", "x", "--timeout", "0.3")
            assert ran.code == code and says in ran.err and not ran.out, (status, ran)
        missing = await world.dure("chat", "nobody", "-m", "x")
        assert missing.code == 3 and "nobody" in missing.err and "dure endpoint list" in missing.err
        assert "REVOKED" in world.statuses() and "ACTIVE" not in world.statuses()

    with_world(tmp_path, body)


def test_what_goes_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        model, url = world.model, world.model.url
        model.token = "sk-right"
        denied = await world.dure("chat", "--base-url", url, "--token", "sk-wrong", "-m", "x")
        assert denied.code == 4 and "dure token create" in denied.err
        model.token = None
        model.prefix = "/elsewhere"
        no_models = await world.dure("chat", "chat", "-m", "x")
        assert no_models.code == 3 and "--model" in no_models.err
        no_chat = await world.dure("chat", "chat", "-m", "x", "--model", "tiny")
        assert no_chat.code == 3 and "is it a language model?" in no_chat.err
        model.prefix, model.status, model.body, model.content_type = "/v1", 200, "", "text/html"
        model.models = []
        empty = await world.dure("chat", "chat", "-m", "x")
        assert empty.code == 1 and "no model yet" in empty.err
        model.models = ["tiny"]
        model.fails_after = 2
        broken = await world.dure("chat", "chat", "-m", "x")
        assert broken.code == 1 and broken.out == "Many hands \n" and "CUDA out of memory" in broken.err
        nobody = await world.dure("chat", "--base-url", "http://127.0.0.1:1/v1", "-m", "x")
        assert nobody.code == 1 and "nobody answers at http://127.0.0.1:1/v1/models" in nobody.err
        for arguments in (
            ("chat",),
            ("chat", "chat", "--base-url", url),
            ("chat", "chat", "-m", " "),
            ("chat", "chat", "-m", "x", "--temperature", "9"),
        ):
            assert (await world.dure(*arguments)).code == 2, arguments
        bad = await world.dure("chat", "--base-url", "ftp://x", "-m", "x")
        assert bad.code == 1 and "ftp://x" in bad.err
        assert set(world.statuses()) == {"REVOKED"}

    with_world(tmp_path, body)


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    answer = "**bold** \x1b[31mred\n\n- first\n- second\n\n```\ncode\n\nmore\n```\n\nlast 두레"
    model = FakeModel(answer=answer, models=["tiny", "large"])

    async def body(world: World) -> None:
        async with world.terminal("chat", "chat") as shown:
            await shown.sees("Talking to tiny (of 2; /model shows all)")
            await shown.sees("> ")
            shown.type("Why?\r")
            await shown.sees("bold [31mred")
            await shown.sees("• second")
            await shown.sees("last 두레")
            await shown.sees("tiny: ")
            await shown.sees("tokens in ")
            await shown.sees("> ")
            # Rendered, and nothing that the model said reached the terminal as a control.
            assert "**" not in shown.text and b"\x1b[31mred" not in shown.data
            shown.type("And then?\r")
            await shown.sees("tokens in ")
            said = [message["content"] for message in model.asked[-1]["messages"]]
            assert said == ["Why?", answer, "And then?"]
            shown.type("/clear\r")
            await shown.sees("(forgotten)")
            shown.type("/model large\r")
            await shown.sees("talking to large")
            shown.type("Again?\r")
            await shown.sees("large: ")
            assert [m["content"] for m in model.asked[-1]["messages"]] == ["Again?"]
            assert model.asked[-1]["model"] == "large"
            shown.type("/model\r")
            await shown.sees("* large")
            shown.type("/nonsense\r")
            await shown.sees("there is no /nonsense")
            shown.type("/help\r")
            await shown.sees("Ctrl-C")
            await shown.sees("> ")
            assert world.statuses() == ["ACTIVE"]
            shown.type("\x04")
            assert await shown.process.wait() == 0
        assert world.statuses() == ["REVOKED"]

    with_world(tmp_path, body, model)


def test_ctrl_c_ends_the_answer_and_errors_do_not_end_the_chat(tmp_path: Path) -> None:
    model = FakeModel(pause_after=2)

    async def body(world: World) -> None:
        async with world.terminal("chat", "chat", "--no-color") as shown:
            await shown.sees("> ")
            shown.type("Why?\r")
            await shown.sees("Many hands")
            shown.type("\x03")
            await shown.sees("(stopped)")
            await asyncio.wait_for(model.left.wait(), 5)
            await shown.sees("> ")
            await shown.types_until("\x03", "Ctrl-D or /quit ends the chat")
            model.pause_after = None
            model.status, model.body, model.headers = 429, '{"error": "busy"}', {"Retry-After": "3"}
            shown.type("Go on\r")
            await shown.sees("busy; try again in 3 s")
            await shown.sees("> ")
            model.status, model.fails_after = 200, 3
            shown.type("Go on\r")
            await shown.sees("CUDA out of memory")
            await shown.sees("> ")
            model.fails_after = None
            shown.type("Go on\r")
            await shown.sees("두레.")
            said = [message["content"] for message in model.asked[-1]["messages"]]
            # What was stopped counts as far as it came; what failed was not said.
            assert said == ["Why?", "Many hands ", "Go on"]
            await shown.sees("> ")
            shown.type("/quit\r")
            assert await shown.process.wait() == 0
        assert world.statuses() == ["REVOKED"]

    with_world(tmp_path, body, model)


@pytest.mark.parametrize("end", ["terminate", "hang up"])
def test_a_chat_that_is_ended_from_outside_revokes_its_token(tmp_path: Path, end: str) -> None:
    model = FakeModel(pause_after=2)

    async def body(world: World) -> None:
        async with world.terminal("chat", "chat") as shown:
            await shown.sees("> ")
            shown.type("Why?\r")
            await model.paused.wait()
            assert world.statuses() == ["ACTIVE"]
            if end == "terminate":
                shown.process.send_signal(signal.SIGTERM)
            else:
                shown.hang_up()
            await shown.process.wait()
        assert world.statuses() == ["REVOKED"]

    with_world(tmp_path, body, model)


def test_one_question_that_is_interrupted(tmp_path: Path) -> None:
    model = FakeModel(pause_after=2)

    async def body(world: World) -> None:
        process = await world.start("chat", "chat", "-m", "x")
        assert process.stdout is not None
        assert await process.stdout.readexactly(11) == b"Many hands "
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        assert process.returncode == 130 and b"Traceback" not in err
        assert out == b"\n"
        assert world.statuses() == ["REVOKED"]

    with_world(tmp_path, body, model)


def test_a_manager_that_went_away_leaves_a_warning(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(FakeModel(pause_after=2)) as model:
            async with fake_manager() as fake:
                world = World(
                    fake,
                    model,
                    {"PATH": os.environ["PATH"], "DURE_CONTEXT_FILE": str(write_context(fake, tmp_path))},
                )
                world.endpoint()
                process = await world.start("chat", "chat", "-m", "x")
                await model.paused.wait()
            model.go_on.set()
            out, err = await process.communicate()
            assert process.returncode == 0 and out.decode() == SENTENCE + "\n"
            assert "was not revoked" in err.decode() and "within 1 h" in err.decode()

    asyncio.run(run())
