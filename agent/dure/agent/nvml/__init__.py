"""NVML, NVIDIA's library of what the driver knows, behind a process of its own.

A driver in trouble can hold a call for ever, and a library can crash. So `worker` calls it in a child of the
agent; `client` asks it, and kills it when it does not answer in time. `reading` is what the worker knows of
NVML, `gpus` (pure) makes devices of what it tells.
"""
