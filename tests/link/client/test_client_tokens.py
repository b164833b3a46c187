"""`dure token`: every way to name a token, and what each form of output holds."""

from __future__ import annotations

from pathlib import Path

import yaml
from link.client.dure_program import Dure, with_cli
from link.client.fake_manager import FakeManager

from dure.v1 import token_pb2
from dure.v1.endpoint_pb2 import Endpoint

CHAT = "projects/default/endpoints/chat"


def _endpoint(fake: FakeManager) -> None:
    fake.endpoints[CHAT] = Endpoint(name=CHAT, uid="u")


def test_issue_list_show_again_and_revoke(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        _endpoint(fake)
        nothing = await dure("token", "list", "chat")
        assert nothing.code == 0 and "dure token create chat" in nothing.err
        made = (
            await dure.ok("token", "create", "chat", "--expires", "7d", "--label", "ci", "-o", "json")
        ).json
        assert made["label"] == "ci" and made["status"] == "ACTIVE" and made["secret"]
        for verb in ("get", "show"):
            again = await dure.ok("token", verb, "chat", "ci")
            assert again.out == f"{made['secret']}\n" and f"token {made['uid']}, ACTIVE" in again.err
        assert (await dure.ok("token", "get", "chat", str(made["uid"]), "-q")).out == f"{made['secret']}\n"
        shown = yaml.safe_load((await dure.ok("token", "get", str(made["name"]), "-o", "yaml")).out)
        assert shown == made
        assert (await dure.ok("token", "get", "chat", "ci", "-o", "name")).out == f"{made['name']}\n"
        listed = (await dure.ok("token", "list", "chat", "-o", "json")).json["tokens"]
        assert isinstance(listed, list) and [item["secret"] for item in listed] == [""]
        assert (await dure.ok("token", "list", "chat", "-q")).out == f"{made['uid']}\n"
        assert str(made["uid"]) in (await dure.ok("token", "list", "chat", "-o", "wide")).out
        revoked = await dure.ok("token", "revoke", "chat", "ci")
        assert revoked.out == f"token {made['uid']} (ci) revoked\n"
        assert "REVOKED" in (await dure.ok("token", "list", "chat")).out
        assert (await dure.ok("token", "list", "chat", "--active", "-q")).out == ""
        assert (await dure.ok("token", "revoke", str(made["name"]), "-o", "json")).json["status"] == "REVOKED"

    with_cli(tmp_path, body)


def test_a_label_names_the_one_that_works_and_several_are_told_apart(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        _endpoint(fake)

        async def issue(label: str) -> str:
            made = await dure.ok("token", "create", "chat", "--expires", "1h", "--label", label, "-o", "json")
            return str(made.json["uid"])

        old, new, third = await issue("ci"), await issue("ci"), await issue("web")
        several = await dure("token", "revoke", "chat", "ci")
        assert several.code == 1 and old in several.err and new in several.err and third not in several.err
        assert (await dure.ok("token", "list", "chat", "--label", "ci", "-q")).out == f"{new}\n{old}\n"
        assert old in (await dure.ok("token", "revoke", "chat", old)).out
        # The one that no longer works is not in the way.
        assert new in (await dure.ok("token", "revoke", "chat", "ci")).out
        assert third in (await dure.ok("token", "revoke", "chat", third[-6:])).out
        assert {token.status for token in fake.tokens.values()} == {token_pb2.TOKEN_STATUS_REVOKED}

    with_cli(tmp_path, body)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        _endpoint(fake)
        for arguments, code, says in (
            (("get", "chat", "nothing"), 3, "dure token list ENDPOINT"),
            (("revoke", "chat", "nothing"), 3, "endpoint chat has no token `nothing`"),
            (("revoke", "chat"), 2, "give ENDPOINT and the token's id or label"),
            (("revoke", f"{CHAT}/tokens/nothing"), 3, "no token"),
            (("create", "nobody", "--expires", "1h"), 3, "dure endpoint list"),
            (("create", "chat"), 2, "--expires"),
            (("create", "chat", "--expires", "tomorrow"), 2, "neither a duration"),
            (("create", "chat", "--expires", "2030-01-01T00:00:00"), 2, "has no time zone"),
            (("create", "chat", "--expires", "0s"), 1, "must be more than zero"),
        ):
            ran = await dure("token", *arguments)
            assert ran.code == code and says in ran.err and not ran.out, (arguments, ran)

    with_cli(tmp_path, body)
