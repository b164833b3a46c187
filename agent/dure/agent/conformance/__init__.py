"""What a manager expects of an agent, as checks that anyone can run: `dure agent conformance`.

A **check** tries one rule of docs/agent-protocol.md and ends in an **outcome**: passed, failed, or not
applicable. It sees the agent through a **stage**: the stand-in manager that the agent talks to, the agent's
program, which can be killed and started again, and the kernels that the check asked for. Nothing is asked of
the agent but what the protocol says, so it may be written in any language.
"""
