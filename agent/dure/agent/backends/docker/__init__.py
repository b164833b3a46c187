"""The Docker back end: a kernel is a container of the node's own engine.

backend     the verbs of `backends.base.Backend`
containers  this agent's containers: found, looked at, ended, removed
starter     starts; starting (pure): what an engine says of one that failed
request     (pure) what a container is asked to be
labels      (pure) what stands on a container, and what the engine says of it
images      fetching images, once however many wait for one
gate        pre-start actions in the container, before its command
logs        copies what a container writes into the kernel's folder
users       whose a container's home is
networks    a network for each session of several kernels
watch       ends of containers, as events
node        what the engine and its node can do
engine      calls of the engine, in bounded threads; streams: what it sends bit by bit
"""
