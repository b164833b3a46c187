"""The command line of Dure."""
