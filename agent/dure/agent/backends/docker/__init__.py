"""The Docker back end: a kernel is a container of the node's own engine.

backend    the verbs of `backends.base.Backend`
engine     calls of the engine, in bounded threads; streams: what it sends bit by bit
request    what a container is asked to be (pure); labels: what stands on it, and what the engine says of
it (pure) images     fetching images, once however many wait for one
gate       pre-start actions in the container, before its command
logs       copies what a container writes into the kernel's folder
watch      ends of containers, as events
node       what the engine and the node can do: GPUs, limits, networks of sessions
"""
