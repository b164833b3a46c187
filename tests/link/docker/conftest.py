"""These tests need a container engine; the image is made before the first of them."""

import pytest
from containers import engines


@pytest.fixture(scope="session", autouse=True)
def image() -> str:
    return engines.provide()
