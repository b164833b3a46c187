"""Settings of all tests."""

from hypothesis import settings

# A property is about values: how long one takes says how busy the machine is.
settings.register_profile("dure", deadline=None)
settings.load_profile("dure")
