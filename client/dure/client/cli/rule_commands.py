"""`dure rule` with all of its commands: importing a file registers those in it."""

from dure.client.cli import rule_explain, rule_record, rule_simulate
from dure.client.cli.rule import rule

__all__ = ["rule", "rule_explain", "rule_record", "rule_simulate"]
