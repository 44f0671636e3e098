"""The environment record: complete, private, and made without importing a framework."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.core import environment


def test_record_is_plain_json_and_holds_what_a_bug_report_needs():
    record = environment.environment()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == 1
    assert record["cpu"]["cores"] == os.cpu_count()
    assert record["versions"]["numpy"]
    assert record["python"].endswith(platform.python_version())
    assert len(record["triptych"]["code_sha256"]) == 64


def test_record_names_no_host_user_or_path():
    text = json.dumps(environment.environment())
    assert platform.node() not in text.replace("vmx", "") or len(platform.node()) < 4
    assert str(Path.home()) not in text
    assert str(environment.PACKAGE) not in text
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in text


def test_paths_in_variables_are_left_out(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/someone/dump --xla_cpu_use_onednn=true")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    variables = environment.environment()["variables"]
    assert variables["XLA_FLAGS"] == "--xla_dump_to=(path) --xla_cpu_use_onednn=true"
    assert variables["OMP_NUM_THREADS"] == "2"


def test_a_library_that_is_not_installed_has_no_entry(monkeypatch):
    monkeypatch.setattr(environment, "DISTRIBUTIONS", {"nothing": ("no-such-distribution",), "click": ("no-such-distribution", "click")})
    assert list(environment.versions()) == ["click"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of ours."""
    for name, text in {"core/a.py": "1", "report/b.css": "2", "core/ignored.pyc": "3"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    return tmp_path


def test_code_hash_follows_names_and_contents_of_source_files_only(package):
    first = environment.code_hash()
    (package / "core" / "ignored.pyc").write_text("other")
    assert environment.code_hash() == first
    (package / "core" / "a.py").write_text("other")
    changed = environment.code_hash()
    (package / "core" / "a.py").rename(package / "core" / "c.py")
    assert len({first, changed, environment.code_hash()}) == 3


def test_code_hash_of_a_part_ignores_the_others(package):
    core = environment.code_hash("core")
    (package / "report" / "b.css").write_text("other")
    assert environment.code_hash("core") == core
    assert environment.code_hash("core", "report") != core


def test_no_framework_is_imported():
    code = (
        "import sys; from triptych.core.environment import environment; environment();"
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax', 'flax', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
