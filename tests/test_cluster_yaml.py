"""cluster.yaml: accepted by Ray's own validator, and true to what it promises."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def written() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(TEXT)
    return config


@pytest.fixture
def cluster(written: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file, its defaults filled in."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(written))
    validate_config(prepared)
    return prepared


def node_types(cluster: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the head's node type and the others by name."""
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    return head, types


def market(node_type: dict[str, Any]) -> str:
    options = node_type["node_config"].get("InstanceMarketOptions", {})
    return str(options.get("MarketType", "on-demand"))


def test_the_validator_would_notice_a_mistake(written: dict[str, Any]) -> None:
    written["available_node_types"]["gpu_spot"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        validate_config(prepare_config(written))


def test_the_head_is_on_demand_and_offers_no_cpu(cluster: dict[str, Any]) -> None:
    head, _ = node_types(cluster)
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert market(head) == "on-demand"


def test_gpu_workers_are_spot_with_an_equal_on_demand_fallback(cluster: dict[str, Any]) -> None:
    _, workers = node_types(cluster)
    gpu = {n: t for n, t in workers.items() if t["resources"].get("GPU", 0) > 0}
    by_market = {market(t): t for t in gpu.values()}
    spot, fallback = by_market["spot"], by_market["on-demand"]
    assert len(gpu) == 2
    assert spot["resources"] == fallback["resources"]
    assert spot["node_config"]["InstanceType"] == fallback["node_config"]["InstanceType"]
    assert spot["priority"] > fallback["priority"]


def test_loader_nodes_have_cpus_only(cluster: dict[str, Any]) -> None:
    _, workers = node_types(cluster)
    loader = workers["loader"]
    assert loader["resources"].get("GPU", 0) == 0
    assert loader["resources"]["CPU"] > 0
    family = loader["node_config"]["InstanceType"].split(".")[0]
    assert not family.startswith(("g", "p"))  # AWS's families with GPUs


def test_an_idle_cluster_costs_the_head_alone(cluster: dict[str, Any]) -> None:
    _, workers = node_types(cluster)
    assert {t["min_workers"] for t in workers.values()} == {0}
    assert 0 < cluster["idle_timeout_minutes"] <= 10
    assert all(t.get("idle_timeout_s", 600) <= 600 for t in workers.values())
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_number_of_nodes_is_bounded(written: dict[str, Any]) -> None:
    _, workers = node_types(written)
    bounds = [t["max_workers"] for t in workers.values()]
    assert all(bound > 0 for bound in bounds)
    assert max(bounds) <= written["max_workers"] <= sum(bounds)


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_start_of_ray_is_in_token_mode(cluster: dict[str, Any], key: str) -> None:
    starts = [command for command in cluster[key] if "ray start" in command]
    assert len(starts) == 1
    assert all(re.search(r"\bRAY_AUTH_MODE=token ray start\b", command) for command in starts)
    assert "--env=RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


def test_the_token_is_a_file_on_every_node_and_not_in_ours(written: dict[str, Any]) -> None:
    assert written["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in TEXT
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|PRIVATE KEY|\b[0-9a-f]{32}\b", TEXT, re.I)


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    commands = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert re.findall(r"--dashboard-host[= ](\S+)", commands) == ["127.0.0.1"]
    assert "0.0.0.0" not in TEXT
    ports = [o for o in cluster["docker"]["run_options"] if o.startswith(("-p", "--publish"))]
    assert ports == []


def test_every_node_installs_the_project_with_constraints(cluster: dict[str, Any]) -> None:
    for key in ("head_setup_commands", "worker_setup_commands"):
        installs = [command for command in cluster[key] if "pip install" in command]
        assert len(installs) == 1
        assert "-c constraints.txt" in installs[0]
        assert "cd /home/ray/orchestrator" in installs[0]
    assert cluster["file_mounts"]["/home/ray/orchestrator"] == "."


def test_the_image_has_the_ray_that_the_constraints_pin(written: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert written["docker"]["image"] == f"rayproject/ray:{pinned[1]}-py311-gpu"
