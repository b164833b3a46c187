"""What was said so far, as it is sent with every question."""

from __future__ import annotations

TURNS_MAX = 100

Message = dict[str, str]


class Conversation:
    """The system prompt, and the last TURNS_MAX questions with their answers."""

    def __init__(self, system: str = "") -> None:
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []

    def with_question(self, text: str) -> list[Message]:
        """The messages to send; the question becomes part of the conversation once it is `answered`."""
        return [*self._system, *self._turns, {"role": "user", "content": text}]

    def answered(self, question: str, answer: str) -> None:
        """Keeps a turn. An answer that was stopped counts as far as it came."""
        self._turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        del self._turns[: -2 * TURNS_MAX]

    def clear(self) -> None:
        """Forgets all but the system prompt."""
        self._turns.clear()
