"""Files of `dure apply`: read with every error at once, written, read again, compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dure.client.manifest import changes, differs, to_manifest
from dure.client.manifest_reader import KEYS, read_manifests
from dure.client.notation import mount_source, mount_target, parse_mount, parse_steps, steps_text
from dure.client.wanted import endpoint_of
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint
from dure.wire.errors import InvalidInput

WHOLE = """
name: chat
project: research
model: llama
runtime: vllm
replicas: 2
open_to_public: true
resource_group: gpu
preset: small
resource_slots: {cpu: 4, mem: 16g, cuda.shares: 0.50}
shared_memory: 1g
environ:
  MODE: fast
  DEBUG: true
  PORTS: 8000
image: server:1
architecture: x86_64
image_pull_policy: ALWAYS
security_profile: strict
require_enforcement: mps
model_mount_destination: /data/model
model_definition_path: other.yaml
extra_mounts:
  - folder: cache
    target: /cache
    subpath: a/b
    writable: true
  - folder: words
cluster_mode: multi-node
cluster_size: 2
priority: 20
service:
  start_command: [serve, --port, "{port}", 3]
  port: 9000
  health_check:
    path: /up
    interval: 5s
    max_retries: 3
    max_wait_time: 1500ms
    expected_status_code: 204
    initial_delay: 0
    probe_during_initial_delay: true
rollout:
  strategy: canary
  max_surge: 25%
  max_unavailable: 1
  progress_deadline: 5m
  steps:
    - {weight: 10, hold: 1m}
    - weight: 50
  no_automatic_rollback: true
scale_to_zero_after: 5m
metrics_path: /stats
scaling:
  - {name: busy, source: proxy, metric: concurrency, above: 8, step: 2, max: 20, window: 10s}
  - {source: kernel, metric: cpu_util, at_most: 0.5, step: -1, cooldown: 60s, clamp: true}
"""


def endpoint(text: str) -> Endpoint:
    [manifest] = read_manifests(text, "f.yaml")
    wanted, _ = endpoint_of(manifest.fields)
    wanted.name, wanted.model = manifest.name, manifest.model
    wanted.replica_count = 1 if manifest.replicas is None else manifest.replicas
    return wanted


def problems(text: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read_manifests(text, "f.yaml")
    return [f"{violation.field} {violation.description}" for violation in caught.value.violations]


def test_every_key_arrives() -> None:
    wanted = endpoint(WHOLE)
    assert read_manifests(WHOLE, "f")[0].project == "research"
    assert (wanted.runtime, wanted.replica_count, wanted.open_to_public) == ("vllm", 2, True)
    assert dict(wanted.resource_slots) == {"cpu": "4", "mem": "16g", "cuda.shares": "0.50"}
    assert dict(wanted.environ) == {"MODE": "fast", "DEBUG": "true", "PORTS": "8000"}
    first, second = wanted.extra_mounts
    assert (first.folder, first.target, first.subpath, first.writable) == ("cache", "/cache", "a/b", True)
    assert (second.folder, second.writable) == ("words", False)
    assert (wanted.cluster_mode, wanted.cluster_size) == (endpoint_pb2.CLUSTER_MODE_MULTI_NODE, 2)
    assert wanted.image_pull_policy == endpoint_pb2.IMAGE_PULL_POLICY_ALWAYS
    assert wanted.security_profile == endpoint_pb2.SECURITY_PROFILE_STRICT
    assert wanted.require_enforcement == "mps"
    assert list(wanted.service.start_command.args) == ["serve", "--port", "{port}", "3"]
    check = wanted.service.health_check
    assert (check.path, check.max_retries, check.expected_status_code) == ("/up", 3, 204)
    assert check.max_wait_time.ToMilliseconds() == 1500
    assert check.HasField("initial_delay") and check.initial_delay.ToSeconds() == 0
    policy = wanted.rollout_policy
    assert policy.strategy == endpoint_pb2.ROLLOUT_STRATEGY_CANARY
    assert (policy.max_surge, policy.max_unavailable, policy.no_automatic_rollback) == ("25%", "1", True)
    assert [(step.weight, step.hold.ToSeconds()) for step in policy.steps] == [(10, 60), (50, 0)]
    assert policy.steps[0].HasField("hold") and not policy.steps[1].HasField("hold")


def test_the_manual_names_every_key_and_is_right() -> None:
    manual = (Path(__file__).parents[3] / "docs" / "apply.md").read_text(encoding="utf-8")
    example = manual.split("```yaml\n")[1].split("```")[0]
    [manifest] = read_manifests(example, "apply.md")
    assert set(yaml.safe_load(example)) == set(KEYS)
    assert manifest.fields["rollout_policy"].steps[0].weight == 10


def test_what_is_written_reads_back_the_same() -> None:
    wanted = endpoint(WHOLE)
    values = to_manifest(wanted, read_manifests(WHOLE, "f")[0].rules or ())
    assert [key for key in KEYS if key != "project"] == list(values)
    for text in (yaml.safe_dump(values), json.dumps(values), json.dumps(values, indent="\t")):
        assert changes(wanted, endpoint(text)) == []
    assert to_manifest(endpoint("{name: a, model: b}")) == {"name": "a", "model": "b", "replicas": 1}


def test_defaults_and_other_words_for_the_same_are_no_changes() -> None:
    said = endpoint(
        "name: a\nmodel: b\nruntime: custom\nmodel_mount_destination: /models\nresource_group: default\n"
        "cluster_size: 1\npriority: 10\nimage_pull_policy: if-not-present\nsecurity_profile: default\n"
        "resource_slots: {mem: 1073741824, cpu: 1.0}\n"
        "rollout: {strategy: rolling, max_surge: 1, progress_deadline: 10m}\n"
    )
    stored = endpoint("name: a\nmodel: b\nresource_slots: {mem: 1g, cpu: 1}\n")
    stored.model = "projects/p/folders/b"
    stored.priority = 0
    assert changes(stored, said) == [] and not differs(stored, said)


def test_the_api_names_are_understood() -> None:
    wanted = endpoint("name: a\nmodel: b\nreplica_count: 3\nrollout_policy: {strategy: BLUE_GREEN}\n")
    assert wanted.replica_count == 3
    assert wanted.rollout_policy.strategy == endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN
    assert problems("name: a\nmodel: b\nreplicas: 1\nreplica_count: 3\n") == [
        "f.yaml:4: replica_count says the same as `replicas`: leave one of them out"
    ]


def test_changes_are_told_by_path() -> None:
    before = endpoint("name: a\nmodel: b\nenviron: {A: '1', B: '2'}\nextra_mounts: [{folder: d}]\n")
    after = endpoint(
        "name: a\nmodel: b\nreplicas: 2\nenviron: {A: '3', C: x}\n"
        "extra_mounts: [{folder: d, writable: true}]\nservice: {start_command: [a, b c]}\n"
        "rollout: {strategy: canary, steps: [{weight: 5, hold: 90s}, {weight: 50}]}\n"
    )
    assert [str(change) for change in changes(before, after)] == [
        "~ replicas: 1 -> 2",
        "~ environ.A: 1 -> 3",
        "+ environ.C: x",
        "+ service.start_command: a 'b c'",
        "+ rollout.strategy: canary",
        "+ rollout.steps: 5:90s,50",
        "~ extra_mounts[/home/work/d]: d, read-only -> d, writable",
        "- environ.B: 2",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["f.yaml:1 the file is empty; expected a mapping with the keys `name` and `model`"]),
        ("- a\n", ["f.yaml:1 found a list, expected a mapping"]),
        ("name: [\n", ["f.yaml:2 not YAML"]),
        ("name: a\n", ["f.yaml:1: model is required"]),
        ("name: a\nmodel: b\nreplcas: 2\n", ["f.yaml:3: replcas unknown key; did you mean `replicas`?"]),
        ("name: a\nmodel: b\nstatus: x\n", ["f.yaml:3: status unknown key; "]),
        ("name: A_b\nmodel: b\n", ["f.yaml:1: name `A_b` is not a name: 1 to 63 lower-case"]),
        ("name: a\nmodel: b\nport: 80\n", ["f.yaml:3: port unknown key here; `port` belongs in `service`"]),
        (
            "name: a\nmodel: b\nreplicas: many\npriority: 0\nresource_slots:\n  cuda.shares: 0.333\n  x: 1\n",
            [
                "f.yaml:6: resource_slots.cuda.shares `0.333` is not a multiple of 0.01",
                "f.yaml:7: resource_slots.x unknown slot `x`",
                "f.yaml:4: priority found the number `0`, expected a whole number from 1 to 100",
                "f.yaml:3: replicas found the text `many`, expected a whole number from 0 to 10000",
            ],
        ),
        (
            'name: a\nmodel: b\nenviron: {"\\uD800": x, A B: y}\n',
            ["environ.? is not a name", "environ.A B is"],
        ),
        ("name: a\nmodel: b\nrollout: {strategy: no}\n", ["found the truth value `no`, expected text"]),
        ("name: a\nmodel: b\nenviron: {A: [1], B: }\n", ["A found a list, expected text", "B has no value"]),
        (
            "name: a\nmodel: b\nextra_mounts: [{target: x}]\n",
            ["extra_mounts[0].folder is required", "extra_mounts[0].target `x` does not begin with `/`"],
        ),
        (
            "name: a\nmodel: b\nservice:\n  shell: /bin/sh\n  start_command: []\n  health_check: true\n",
            ["is an empty list", "f.yaml:4: service.shell a command that is a list", "or `false`"],
        ),
        (
            "name: a\nmodel: b\nservice:\n  health_check: {path: up, interval: 0, max_wait_time: soon}\n",
            ["`up` does not begin with `/`", "a duration of more than zero", "`soon` is not a duration"],
        ),
        (
            "name: a\nmodel: b\nrollout: {strategy: up, max_surge: x, steps: [{weight: 100}, {hold: 1s}]}\n",
            [
                "expected one of: rolling, blue-green, canary",
                "a percentage such as 25%",
                "rollout.steps[0].weight found the number `100`",
                "rollout.steps[1].weight is required",
            ],
        ),
        (
            "name: a\nmodel: b\n---\nname: c\n---\n# nothing\n---\nname: a\nmodel: b\nx: 1\n",
            ["f.yaml:4: model is required", "f.yaml:10: x unknown key", "f.yaml:8: name `a` is in line 1"],
        ),
    ],
)
def test_problems(text: str, said: list[str]) -> None:
    found = problems(text)
    missing = [piece for piece in said if not any(piece in problem for problem in found)]
    assert not missing and len(found) == len(said), found


def test_several_documents_know_their_lines() -> None:
    text = (
        "# one\nname: a\nmodel: m\n--- # two\nname: b\nmodel: m\nreplicas: 0\n...\n---\nname: c\nmodel: m\n"
    )
    found = read_manifests(text, "f")
    assert [(manifest.name, manifest.replicas) for manifest in found] == [("a", None), ("b", 0), ("c", None)]


@given(st.text(max_size=200) | st.sampled_from(KEYS).map(lambda key: f"name: a\nmodel: b\n{key}: &a [*a]\n"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_manifests(text, "f.yaml")
    except InvalidInput as error:
        assert error.violations


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=6))
def test_any_values_are_read_or_refused(document: dict[str, object]) -> None:
    try:
        for manifest in read_manifests(yaml.safe_dump(document), "f.yaml"):
            endpoint_of(manifest.fields)
    except InvalidInput as error:
        assert error.violations


def test_mounts() -> None:
    cases = {
        "data": ("data", "/home/work/data", False),
        "data:rw": ("data", "/home/work/data", True),
        "data:ro": ("data", "/home/work/data", False),
        "data/a/b:/x:rw": ("data/a/b", "/x", True),
        "projects/p/folders/data/sub:/x": ("data/sub", "/x", False),
    }
    for text, (source, target, writable) in cases.items():
        mount = parse_mount(text)
        assert (mount_source(mount), mount_target(mount), mount.writable) == (source, target, writable)
    for text in ("", ":/x", "data:x", "data:/x:rx", "/data:/x", "a:/b:/c:rw"):
        with pytest.raises(ValueError, match="does not have the form"):
            parse_mount(text)


def test_canary_steps() -> None:
    assert steps_text(parse_steps("10:60s, 50%:2m,90")) == "10:60s,50:120s,90"
    for text in ("", "a", "10:", "10:x", "10;20"):
        with pytest.raises(ValueError, match=r"WEIGHT|duration"):
            parse_steps(text)
