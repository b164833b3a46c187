"""A whole cluster on one machine: one child process per program, all state in one data folder."""
