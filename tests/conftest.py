"""Settings of all tests."""

import pytest
from hypothesis import settings

# A property is about values: how long one takes says how busy the machine is.
settings.register_profile("dure", deadline=None)
settings.load_profile("dure")
# Files are given to workers in this order: those that take minutes first, so that none is alone with one
# at the end.
_LONG_FIRST = ("conformance", "tests/system", "tests/link/docker", "tests/link/agent", "tests/link")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((n for n, part in enumerate(_LONG_FIRST) if part in path), len(_LONG_FIRST))

    items.sort(key=place)
