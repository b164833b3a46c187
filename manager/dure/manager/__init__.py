"""The manager: the gRPC API, the store, and every decision on what runs where."""
