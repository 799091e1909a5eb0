"""Whether a cluster can add nodes, by what monitors of Ray 2.60 wrote of two."""

import json
from typing import Any

import pytest
from ray._private import ray_constants
from ray.autoscaler._private.util import format_readonly_node_type

from orchestrator import cluster

NODE = "bdabcd86f07fa2a63ad5b34a30283d326313f82abb27b98657e90cc6"
OWN = format_readonly_node_type(NODE)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"active_nodes": {OWN: 1}, "node_type_mapping": {NODE: OWN}}, False),
        ({"active_nodes": {"ray.head.default": 1}}, True),
        ({"active_nodes": {OWN: 1, "gpu-workers": 2}}, True),
        ({"active_nodes": {}}, True),
        (None, True),
    ],
)
def test_a_monitor_without_a_config_names_types_after_nodes(report: Any, expected: bool) -> None:
    status = {"time": 1.0, "monitor_pid": 2, "autoscaler_report": report}
    assert cluster.has_autoscaler(json.dumps(status).encode()) is expected


def test_a_monitor_that_says_nothing_may_come_to_it() -> None:
    assert cluster.has_autoscaler(None)
    assert cluster.has_autoscaler(b'{"time": 1.0}')


def test_ray_still_keeps_it_there() -> None:
    assert ray_constants.DEBUG_AUTOSCALING_STATUS == cluster._STATUS_KEY


def test_only_a_cluster_that_is_named_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not cluster.may_grow()
