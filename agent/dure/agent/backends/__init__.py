"""Back-end plug-ins: what runs a kernel on a node. `base` holds the contract."""
