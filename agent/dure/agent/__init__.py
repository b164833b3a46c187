"""The agent: runs the kernels that the manager wants on its node, probes and reports them."""
