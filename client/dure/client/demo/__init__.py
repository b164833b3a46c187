"""The demonstration: a real model behind a permanent, authenticated address, on this machine."""
