"""compose.yaml and docker/: locks pinned by hash, neither root nor network at run time, and names that agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from triptych.core import contract
from triptych.export.converters import CONVERTERS

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))

each_service = pytest.mark.parametrize("name", SERVICES)
each_dockerfile = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)


def instructions(file: Path) -> list[str]:
    """A Dockerfile's instructions, continuation lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return [" ".join(each.split()) for each in "\n".join(lines).replace("\\\n", " ").splitlines() if each.strip()]


def final(file: Path) -> list[str]:
    """The instructions of the last stage."""
    every = instructions(file)
    return every[max(number for number, each in enumerate(every) if each.startswith("FROM ")) :]


def lock_of(service: dict[str, Any]) -> str:
    """The lock that a service's image is built from."""
    default = re.search(r"^ARG LOCK=(\S+)$", (ROOT / service["build"]["dockerfile"]).read_text(), re.M)
    assert default
    return str(service["build"]["args"].get("LOCK", default[1]))


def unpinned(lock: str) -> list[str]:
    """Requirements without an exact version and at least one SHA-256."""
    entries = re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", lock, flags=re.M).strip())
    return [
        each.split()[0] for each in entries if not re.match(r"[\w.-]+(\[\S+\])?==\S+( ;[^\n]*)? \\\n\s+--hash=sha256:[0-9a-f]{64}", each)
    ]


def test_there_is_a_service_a_framework_and_one_for_the_report():
    assert {*contract.FRAMEWORKS, "report"} <= set(SERVICES)
    assert {file.name for file in DOCKERFILES} == {f"{name}.Dockerfile" for name in (*contract.FRAMEWORKS, "report")}
    assert set(SERVICES["report"]["depends_on"]) == set(contract.FRAMEWORKS)


@each_service
def test_a_service_has_no_root_no_network_and_writes_to_volumes_only(name):
    service = SERVICES[name]
    assert (service["network_mode"], service["read_only"], service["cap_drop"]) == ("none", True, ["ALL"])
    assert not service["user"].startswith(("0", "root"))
    assert [place.split(":")[1] for place in service["volumes"] if not place.endswith(":ro")] == ["/triptych/runs", "/triptych/hosts"]
    assert "privileged" not in service


@each_service
def test_its_image_is_built_from_a_lock_pinned_by_hash(name):
    service = SERVICES[name]
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    lock = (ROOT / "requirements" / f"{lock_of(service)}.txt").read_text()
    assert unpinned(lock) == []
    assert lock_of(service) in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert lock_of(service) in (ROOT / "requirements/lock.sh").read_text(), "the same script makes it"


def test_a_lock_without_a_hash_is_seen():
    pinned = f"a==1 \\\n    --hash=sha256:{'0' * 64}\n    # via b\n"
    assert unpinned(f"# made by\n{pinned}") == []
    assert unpinned(f"{pinned}c==2\n") == ["c==2"]
    assert unpinned(f"{pinned}d>=2 \\\n    --hash=sha256:{'0' * 64}\n") == ["d>=2"]


def test_the_locks_agree_with_the_widest():
    """What was proven is what the images run: one version of each library, wherever it is installed."""
    files = [file for file in (ROOT / "requirements").glob("*.txt") if file.stem not in CONVERTERS]  # these have environments of their own
    pins = {file.stem: dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.M)) for file in files}
    assert {
        (lock, name, version) for lock, each in pins.items() for name, version in each.items() if pins["dev"].get(name, version) != version
    } == set()


@each_dockerfile
def test_nothing_is_installed_without_a_hash_and_no_cache_is_left(file):
    installs = [part for each in instructions(file) for part in each.split("&&") if re.search(r"\bpip3? install\b", part)]
    assert len(installs) == 2
    for each in installs:
        assert "--no-cache-dir" in each
        assert "--require-hashes --only-binary :all:" in each or "--no-index --no-deps --no-build-isolation ." in each
    for each in instructions(file):
        if "apt-get" in each:
            assert "--no-install-recommends" in each
            assert "rm -rf /var/lib/apt/lists/* /var/cache/apt/* " in each, "in the same layer"


@each_dockerfile
def test_the_image_is_anyones_but_roots_and_cannot_install(file):
    users = [each for each in final(file) if each.startswith("USER ")]
    assert users == ["USER 1000:1000"]
    assert not any("pip install" in each or each.startswith("ADD ") for each in final(file))
    assert any("pip uninstall --yes pip" in each for each in instructions(file))
    assert instructions(file)[0].startswith("ARG BASE_IMAGE=")
    assert [each.split()[1] for each in instructions(file) if each.startswith("FROM ")] == ["${BASE_IMAGE}"] * 2


def test_the_three_are_one_text():
    """Only the name, the lock and PyTorch's compiler differ."""

    def told(name: str) -> list[str]:
        every = [each for each in instructions(ROOT / f"docker/{name}.Dockerfile") if "apt-get" not in each]
        return [each.replace(name, "NAME") for each in every]

    assert told("pytorch") == told("tensorflow") == told("jax")


def test_hosts_listen_where_the_report_asks():
    for orchestrator, end in (("report", ""), ("parity-gpu", "-gpu")):
        asked = dict(entry.split("=") for entry in SERVICES[orchestrator]["environment"]["TRIPTYCH_HOSTS"].split(","))
        assert set(asked) == set(contract.FRAMEWORKS)
        for framework, path in asked.items():
            service = SERVICES[framework + end]
            said = service.get("command") or yaml.safe_load(instructions(ROOT / service["build"]["dockerfile"])[-1].removeprefix("CMD "))
            assert said == ["worker", framework, "--listen", path]


def test_the_build_context_is_named_file_by_file():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    copied = {
        word for file in DOCKERFILES for each in instructions(file) if each.startswith("COPY ") and "--from" not in each
        for word in each.split()[1:-1] if not word.startswith("--")
    }  # fmt: skip
    assert {word.split("/")[0] for word in copied} == {line[1:] for line in ignored if line.startswith("!")}
