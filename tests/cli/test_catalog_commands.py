"""`triptych list` and `triptych info`: right, quick, and without numpy or any framework."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from triptych.cli import group
from triptych.cli.catalog import info_command, list_command
from triptych.core.errors import UsageError

QUICK = (["--help"], ["list"], ["info", "resnet50"])
HEAVY = (
    "numpy",
    "torch",
    "torchvision",
    "tensorflow",
    "keras",
    "jax",
    "flax",
    "optax",
    "pydantic",
    "safetensors",
    "rich",
    "matplotlib",
    "PIL",
)
LIMIT_MS = 150

# Runs the command in-process and prints which heavy modules it left behind.
PROBE = f"""
import contextlib, io, sys
from triptych.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(sys.argv[1:])
assert out.getvalue()
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def invoke(command, *arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_matches_a_pattern():
    rows = json.loads(invoke(list_command, "resnet*2", "--json"))
    assert [row["name"] for row in rows] == ["resnet152", "resnet32"]
    assert "25,557,032" in invoke(list_command)


def test_list_without_a_match_is_a_usage_error():
    with pytest.raises(UsageError, match="no catalogued model matches 'vgg"):
        invoke(list_command, "vgg*")


def test_info_of_resnet50():
    text = invoke(info_command, "resnet50")
    assert "25,557,032" in text
    assert "4.09 G" in text
    assert "1 MAC = 2 FLOPs" in text
    assert "short side to 256" in text
    data = json.loads(invoke(info_command, "resnet50", "--json"))
    assert data["parameters"] == 25_557_032
    assert data["flops"] == 2 * data["macs"] == 8_178_368_512
    assert data["spec"]["batch_norm"] == {"epsilon": 1e-5, "momentum": 0.1}
    assert "layers" not in data


def test_info_takes_options_and_shows_layers():
    data = json.loads(
        invoke(info_command, "resnet20", "--num-classes", "7", "--image-size", "64", "--in-channels", "1", "--layers", "--json")
    )
    assert (data["spec"]["num_classes"], data["spec"]["image_size"], data["spec"]["in_channels"]) == (7, 64, 1)
    assert data["layers"][0] == {"name": "conv1", "op": "conv", "output": [64, 64, 16], "parameters": 144, "macs": 64 * 64 * 144}
    assert sum(layer["parameters"] for layer in data["layers"]) == data["parameters"]
    assert "layer3.2.conv2" in invoke(info_command, "resnet20", "--layers")


def test_info_of_a_model_without_images():
    text = invoke(info_command, "transformer_block", "--width", "96", "--layers")
    assert "features (N, tokens, width) = (N, 64, 96); 96 outputs for each token" in text
    assert "none: no image files go in" in text
    assert "a sample" in text
    data = json.loads(invoke(info_command, "transformer_block", "--tokens", "7", "--heads", "6", "--mlp-width", "10", "--json"))
    assert [data["spec"][name] for name in ("tokens", "width", "heads", "mlp_width")] == [7, 192, 6, 10]
    with pytest.raises(UsageError, match="transformer_block has no option 'image_size'; it takes tokens, width, heads, mlp_width"):
        invoke(info_command, "transformer_block", "--image-size", "32")


def test_info_of_an_unknown_model_or_a_bad_option_says_what_to_do():
    with pytest.raises(UsageError, match="did you mean 'resnet5"):
        invoke(info_command, "resnet5")
    with pytest.raises(UsageError, match="num_classes=0 must be a positive integer"):
        invoke(info_command, "resnet50", "--num-classes", "0")


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_import_no_numpy_and_no_framework(arguments):
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_take_less_than_150_ms(arguments):
    """Median of 9. A busy machine gets three rounds, and processor time, which waiting hardly inflates, may show it instead."""
    rounds = []
    while len(rounds) < 3 and (not rounds or min(rounds[-1]) >= LIMIT_MS):
        walls, processors = zip(*(_timed(arguments) for _ in range(9)), strict=True)
        rounds.append((statistics.median(walls), statistics.median(processors)))
    assert min(rounds[-1]) < LIMIT_MS, f"{' '.join(arguments)}: (wall, processor) ms a round: {rounds}"


def _timed(arguments: list[str]) -> tuple[float, float]:
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "triptych.cli", *arguments], capture_output=True, check=True)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return 1000 * wall, 1000 * used


def test_every_listed_command_has_a_line_of_help():
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    for name in ("list", "info", "doctor", "report", "parity"):
        assert f"\n  {name} " in result.output
