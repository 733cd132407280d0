"""docker/compose.yaml as a real Compose reads it (Debian's docker-compose 1.29), with its variables and presets.

No engine runs here, so nothing is started.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.backends import Backend

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = DOCKER / "compose.yaml"
EXAMPLE = DOCKER / "env.example"
PRESETS = sorted(DOCKER.glob("presets/*.env"))
SERVERS = ["vllm-0", "vllm-1"]


def resolved(env_file: Path = EXAMPLE, **environment: str) -> dict[str, Any]:
    """The file as Compose reads it, with the variables of a file or of the environment."""
    program = shutil.which("docker-compose")
    if not program:
        pytest.fail("docker-compose is not installed, and nobody else can say what it reads: apt-get install it")
    own = {name: value for name, value in os.environ.items() if name not in variables()} | {"COMPOSE_PROFILES": "dual"}
    done = subprocess.run(
        [program, "--file", str(COMPOSE), "--env-file", str(env_file), "config"],
        capture_output=True, text=True, timeout=60, env=own | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return yaml.safe_load(done.stdout)


def settings(path: Path) -> dict[str, str]:
    """The variables of an env file: NAME=value, a line each."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", line) for line in lines), lines
    return dict(line.split("=", 1) for line in lines)


def variables() -> dict[str, str]:
    """The variables of compose.yaml, with their defaults."""
    # Only what Compose reads: a comment can name a variable as well.
    text = json.dumps(yaml.safe_load(COMPOSE.read_text()))
    found = re.findall(r"\$\{([^}]+)\}", text)
    defaults: dict[str, str] = {}
    for name, sign, default in (each.partition(":-") for each in found):
        assert sign, f"{name} has no default"
        assert defaults.setdefault(name, default) == default, f"{name} has two defaults"
    return defaults


@pytest.fixture
def everything(tmp_path) -> Path:
    """env.example with every line that sets a variable uncommented."""
    path = tmp_path / "all.env"
    path.write_text(re.sub(r"(?m)^#(?=[A-Z0-9_]+=)", "", EXAMPLE.read_text()))
    return path


def words(service: dict[str, Any]) -> dict[str, str]:
    """The options of a server by name."""
    command = service["command"]
    parts = shlex.split(command) if isinstance(command, str) else command
    assert len(parts) % 2 == 0, parts
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def _plain() -> dict[str, Any]:
    return resolved()


@pytest.fixture
def plain(_plain) -> dict[str, Any]:
    """The file without any variable set; tests may change it."""
    return copy.deepcopy(_plain)


def option(variable: str) -> str:
    """The option of ``vllm serve`` that a variable is named for."""
    return f"--{variable.lower().replace('_', '-')}"


# --- the services ---


def test_one_server_starts_without_a_profile_and_dual_adds_the_other_and_nginx(plain):
    profiles = {name: service.get("profiles", []) for name, service in plain["services"].items()}
    assert profiles == {"vllm-0": [], "vllm-1": ["dual"], "nginx": ["dual"]}


def test_servers_differ_in_gpu_port_and_address_only(plain):
    services = plain["services"]
    both = [services[name] for name in SERVERS]
    devices = [service.pop("deploy")["resources"]["reservations"]["devices"] for service in both]
    assert devices == [[{"driver": "nvidia", "device_ids": [gpu], "capabilities": ["gpu"]}] for gpu in ("0", "1")]
    assert [service.pop("ports") for service in both] == [["127.0.0.1:8000:8000/tcp"], ["127.0.0.1:8001:8000/tcp"]]
    addresses = [service.pop("networks")["serving"]["ipv4_address"] for service in both]
    assert {**both[0], "profiles": []} == {**both[1], "profiles": []}
    assert services["nginx"]["extra_hosts"] == dict(zip(SERVERS, addresses, strict=True))
    assert services["nginx"]["ports"] == ["127.0.0.1:80:80/tcp"]


def test_the_servers_of_nginx_are_services_with_fixed_addresses(plain):
    text = (DOCKER / "nginx.conf").read_text()
    names = {*re.findall(r"(?m)^ *server ([a-z0-9-]+):8000", text)}
    assert names == {*SERVERS}
    assert names == {*plain["services"]["nginx"]["extra_hosts"]}
    (subnet,) = (each["subnet"] for each in plain["networks"]["serving"]["ipam"]["config"])
    for address in plain["services"]["nginx"]["extra_hosts"].values():
        assert address.rpartition(".")[0] == subnet.rpartition(".")[0]
    (volume,) = plain["services"]["nginx"]["volumes"]
    assert volume == f"{DOCKER / 'nginx.conf'}:/etc/nginx/nginx.conf:ro"


def test_downloads_and_compiled_kernels_outlive_the_containers(plain):
    mounts = dict(volume.split(":")[:2] for volume in plain["services"]["vllm-0"]["volumes"])
    assert mounts == {"hf-cache": "/home/vllm/.cache/huggingface", "triton-cache": "/home/vllm/.triton"}
    assert {*mounts} == {*plain["volumes"]}


def test_every_service_has_a_healthcheck_and_restarts(plain):
    for name, service in plain["services"].items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", "no shell, and none needed"
        assert "/health" in service["healthcheck"]["test"][-1]
        assert {*service["healthcheck"]} == {"test", "interval", "timeout", "retries", "start_period"}
        assert service["logging"]["options"]["max-size"], "a log without an end fills the disk"


def test_the_healthcheck_passes_only_while_the_server_is_healthy(plain):
    kind, python, *words = plain["services"]["vllm-0"]["healthcheck"]["test"]
    assert (kind, python) == ("CMD", "python3")
    server = Backend("vllm-0")

    def green() -> bool:
        here = [word.replace("127.0.0.1:8000", server.address) for word in words]
        assert here != words
        return subprocess.run([sys.executable, *here], capture_output=True, timeout=30).returncode == 0

    try:
        assert not green()
        server.start()
        assert green()
        server.behave(health=503)
        assert not green()
    finally:
        server.kill()


def test_a_server_has_the_shared_memory_that_pytorch_needs(plain):
    service = plain["services"]["vllm-0"]
    assert service["shm_size"] == "2gb"
    assert service["ulimits"] == {"memlock": -1, "stack": 64 << 20}


# --- the settings ---


def test_the_defaults_are_those_recommended_for_volta(plain):
    service = plain["services"]["vllm-0"]
    assert service["image"] == "localhost/voltforge:0.12.0-sm70"
    assert words(service) == {
        "--host": "0.0.0.0",
        "--port": "8000",
        "--model": "Qwen/Qwen2.5-1.5B-Instruct",
        "--dtype": "half",
        "--max-model-len": "512",
        "--max-num-batched-tokens": "4096",
        "--max-num-seqs": "128",
        "--gpu-memory-utilization": "0.90",
        "--swap-space": "0",
    }
    assert service["environment"] == {"VLLM_API_KEY": "", "HF_TOKEN": ""}


def test_the_example_documents_every_variable_with_its_default(everything, plain):
    assert settings(everything) == variables()
    text = EXAMPLE.read_text()
    assert re.findall(r"(?m)^(?!#|$).*", text) == [], "copied as it is, it changes nothing"
    assert resolved(everything) == plain


def test_every_variable_reaches_its_option():
    """Each is given a value of its own, and each value is found again."""
    options = {
        "MODEL": "some/model", "DTYPE": "float", "MAX_MODEL_LEN": "1001", "MAX_NUM_BATCHED_TOKENS": "1002",
        "MAX_NUM_SEQS": "1003", "GPU_MEMORY_UTILIZATION": "0.5", "SWAP_SPACE": "7",
    }  # fmt: skip
    ports = {"PORT_0": "18000", "PORT_1": "18001", "PORT": "18080", "BIND": "0.0.0.0", "SUBNET": "10.9.8"}
    more = {
        "API_KEY": "key", "HF_TOKEN": "token", "VOLTFORGE_IMAGE": "an/image:1", "NGINX_IMAGE": "another:2",
        "EXTRA_ARGS": "--served-model-name mine --seed 1",
    }  # fmt: skip
    given = options | ports | more
    assert {*given} == {*variables()}
    services = resolved(**given)["services"]
    assert words(services["vllm-1"]) == {
        **{option(name): value for name, value in options.items()},
        "--host": "0.0.0.0", "--port": "8000", "--served-model-name": "mine", "--seed": "1",
    }  # fmt: skip
    assert services["vllm-1"]["environment"] == {"VLLM_API_KEY": "key", "HF_TOKEN": "token"}
    assert [services[name]["image"] for name in (*SERVERS, "nginx")] == ["an/image:1", "an/image:1", "another:2"]
    assert [services[name]["ports"] for name in (*SERVERS, "nginx")] == [
        ["0.0.0.0:18000:8000/tcp"], ["0.0.0.0:18001:8000/tcp"], ["0.0.0.0:18080:80/tcp"],
    ]  # fmt: skip
    assert services["nginx"]["extra_hosts"] == {"vllm-0": "10.9.8.10", "vllm-1": "10.9.8.11"}


def test_throughput_is_the_default(plain):
    assert resolved(DOCKER / "presets" / "throughput.env") == plain


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_sets_only_used_variables_that_vllm_accepts(preset):
    chosen = settings(preset)
    assert {*chosen} == {*settings(PRESETS[-1])}, "all set the same, so that one takes the place of another"
    assert {*chosen} <= {*variables()}
    options = words(resolved(preset)["services"]["vllm-0"])
    assert {option(name): value for name, value in chosen.items()}.items() <= options.items()
    # What vLLM 0.12 refuses to start with (SchedulerConfig), as far as the numbers alone can say it. A prompt that is
    # longer than a step is read in pieces.
    assert int(options["--max-num-seqs"]) <= int(options["--max-num-batched-tokens"])
    assert 0 < float(options["--gpu-memory-utilization"]) <= 1


def test_every_preset_named_in_the_file_exists():
    assert [path.stem for path in PRESETS] == ["decisions", "long-context", "throughput"]
