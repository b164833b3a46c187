"""Amounts of slots: exact decimal strings at the edges, integer milli-units inside.

A milli-unit is a thousandth of a core, of a byte, of a share, of a device. `cuda.shares` come in
hundredths, so that every amount of every slot is a whole number of milli-units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from dure.wire.errors import InvalidInput, Violation

MILLI = 1000
CPU, MEM, SHARES, DEVICES = "cpu", "mem", "cuda.shares", "cuda.device"
SLOTS = (CPU, MEM, SHARES, DEVICES)

_NUMBER = re.compile(r"(\d{1,18}(?:\.\d{1,9})?|\.\d{1,9})\s*([A-Za-z]*)")
_MEMORY_UNITS = {"": 1, "b": 1} | {
    unit: 1024**power
    for power, letter in enumerate("kmgtp", start=1)
    for unit in (letter, f"{letter}b", f"{letter}i", f"{letter}ib")
}
_LIMITS = {CPU: 10_000 * MILLI, MEM: 2**50 * MILLI, SHARES: 1024 * MILLI, DEVICES: 1024 * MILLI}


def parse_slots(slots: Mapping[str, str], field: str) -> dict[str, int]:
    """Milli-units of each slot. Raises InvalidInput with a violation for each that is not exact.

    `cpu` is a multiple of 0.001; `mem` a positive whole number of bytes (suffixes are powers of 1024);
    `cuda.shares` a positive multiple of 0.01; `cuda.device` a positive whole number.
    """
    amounts: dict[str, int] = {}
    violations: list[Violation] = []
    for slot, text in slots.items():
        try:
            amounts[slot] = parse_slot(slot, text)
        except ValueError as error:
            violations.append(Violation(f"{field}[{slot}]", str(error)))
    if SHARES in amounts and DEVICES in amounts:
        violations.append(Violation(field, f"`{SHARES}` and `{DEVICES}` exclude each other: ask for one"))
    if violations:
        raise InvalidInput.of(violations)
    return amounts


def parse_slot(slot: str, text: str) -> int:
    """Milli-units of one slot. Raises ValueError with a sentence that says what was expected."""
    if slot not in SLOTS:
        raise ValueError(f"unknown slot `{slot[:60]}`; known: {', '.join(SLOTS)}")
    match = _NUMBER.fullmatch(text.strip().replace("_", ""))
    if match is None:
        raise ValueError(
            f"`{text[:60]}` is not an amount; write a positive number such as `{_EXAMPLES[slot]}`"
        )
    number, unit = Decimal(match[1]), match[2].lower()
    if slot == MEM:
        if unit not in _MEMORY_UNITS:
            raise ValueError(
                f"`{text[:60]}`: unknown unit `{match[2]}`; write bytes or k, m, g, t (powers of 1024)"
            )
        number *= _MEMORY_UNITS[unit]
        if number != number.to_integral_value():
            raise ValueError(f"`{text[:60]}` is not a whole number of bytes")
    elif unit:
        raise ValueError(f"`{text[:60]}`: `{slot}` has no unit; write a number such as `{_EXAMPLES[slot]}`")
    if slot == SHARES and (number * 100) % 1 != 0:
        below, above = (number.quantize(Decimal("0.01"), way) for way in ("ROUND_FLOOR", "ROUND_CEILING"))
        raise ValueError(
            f"`{text[:60]}` is not a multiple of 0.01 (1.00 is one GPU); the nearest are {below} and {above}"
        )
    if slot == DEVICES and number % 1 != 0:
        raise ValueError(
            f"`{text[:60]}` is not a whole number of devices; for a part of one ask for `{SHARES}`"
        )
    milli = number * MILLI
    if milli % 1 != 0:
        raise ValueError(f"`{text[:60]}` is finer than 0.001")
    if milli <= 0:
        raise ValueError(f"`{text[:60]}` must be more than zero")
    if milli > _LIMITS[slot]:
        raise ValueError(
            f"`{text[:60]}` is more than {format_slot(slot, _LIMITS[slot])}, the most that can be asked for"
        )
    return int(milli)


_EXAMPLES = {CPU: "1.5", MEM: "8g", SHARES: "0.5", DEVICES: "1"}


def format_slot(slot: str, milli: int) -> str:
    """The decimal string of an amount; memory in bytes, shares with two places."""
    number = Decimal(milli) / MILLI
    if slot == SHARES and milli % 10 == 0:
        return f"{number:.2f}"
    return f"{number.normalize():f}"


def human_slot(slot: str, milli: int) -> str:
    """An amount for people: memory with a binary unit."""
    if slot != MEM:
        return format_slot(slot, milli)
    return human_bytes(milli // MILLI)


def human_bytes(number: int) -> str:
    """`1.5 GiB` for 1610612736."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def parse_duration_s(text: str) -> float:
    """Seconds of `90`, `90s`, `15m`, `1h30m`, `7d`. Raises ValueError."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d{1,9}(?:\.\d+)?)(ms|[smhdw])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"`{text[:40]}` is not a duration; write one such as 90s, 15m, 1h30m, 7d")
    return sum(float(number) * units[unit] for number, unit in parts)
