"""The client library of Dure."""
