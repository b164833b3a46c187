"""Talking to a language model behind an OpenAI-compatible API, one of Dure's endpoints or any other."""
