"""Which registry an image comes from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.wire.images import registry_host, registry_of

DIGEST = "sha256:" + "0" * 64
LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
PATH = st.from_regex(r"[a-z0-9]+(/[a-z0-9]+){0,2}(:[a-z0-9]{1,8})?", fullmatch=True)
HOSTS = st.one_of(
    st.builds("{}.{}".format, LABEL, LABEL),
    st.builds("{}:{}".format, LABEL, st.integers(1, 65535)),
    st.builds("{}.{}:{}".format, LABEL, LABEL, st.integers(1, 65535)),
    st.just("localhost"),
)


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("python", "docker.io"),
        ("python:3.11", "docker.io"),
        (f"python@{DIGEST}", "docker.io"),
        ("vllm/vllm-openai:latest", "docker.io"),
        ("docker.io/library/python", "docker.io"),
        ("index.docker.io/library/python", "docker.io"),
        ("registry-1.docker.io/me/server", "docker.io"),
        ("ghcr.io/me/server:1", "ghcr.io"),
        ("nvcr.io/nim/meta/llama:1.0", "nvcr.io"),
        ("registry.example.com:5000/a/b/c:1", "registry.example.com:5000"),
        (f"registry.example.com:5000/a@{DIGEST}", "registry.example.com:5000"),
        ("localhost/server", "localhost"),
        ("localhost:5000/server", "localhost:5000"),
        ("myhost/server", "docker.io"),
        ("MyHost/server", "myhost"),
        ("GHCR.io/me/server", "ghcr.io"),
        ("", "docker.io"),
    ],
)
def test_of_an_image(image: str, host: str) -> None:
    assert registry_of(image) == host


@pytest.mark.parametrize("text", ["Docker.IO", "index.docker.io", " registry-1.docker.io "])
def test_aliases_are_one_registry(text: str) -> None:
    assert registry_host(text) == "docker.io"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a host"),
        ("a b.c", "is not a host"),
        ("ghcr.io:", "is not a host"),
        ("ghcr.io:0", "is not a host"),
        ("ghcr.io:65536", "is not a host"),
        ("-a.b", "is not a host"),
        ("a..b", "is not a host"),
        ("a." * 70 + "b", "is not a host"),
        ("me:secret@ghcr.io", "^`ghcr.io` is not a host"),
        ("https://ghcr.io/v2/", "that images name: ghcr.io"),
        ("https://me:secret@ghcr.io/v2/", "^`ghcr.io/v2/` is an address.*that images name: ghcr.io$"),
        ("ghcr.io/me", "that images name: ghcr.io"),
        ("myhost", "such as myhost:5000"),
    ],
)
def test_what_is_no_registry(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        registry_host(text)


@given(host=HOSTS, path=PATH)
def test_a_host_that_is_kept_is_the_one_of_its_images(host: str, path: str) -> None:
    assert registry_of(f"{registry_host(host)}/{path}") == registry_host(host)
    assert registry_of(f"{host.upper()}/{path}") == registry_host(host)
