"""The shim: one small process per session that outlives the agent.

It starts the session, keeps its log within bounds, stops it when told to, and writes down how it ended.
Files in the kernel's folder are all that it shares with the agent:

    plan.json    what to run (written by the agent before)
    state.json   how far it is, and the pids
    exit.json    how it ended; written last
    notify       a FIFO: a byte says that state.json changed
    log, log.1   what the session wrote, see `log`

SIGTERM asks for a graceful stop, SIGUSR1 for a prompt end. Its exit means that nothing of the session
runs any more. It imports little, so that a node with a hundred sessions does not pay for a hundred agents.
"""
