"""Reading foreign files: told by content, never run, refused with the reason and the name."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, foreign_file, importers, initialize, tensor_file
from triptych.core.errors import InputRefused


def refusal(path: Path) -> str:
    """The message with which `path` is refused; it names the file."""
    with pytest.raises(InputRefused) as caught:
        foreign_file.read(path)
    assert caught.value.exit_code == 8
    assert str(path) in str(caught.value)
    return str(caught.value)


def zipped(*names: str, content: bytes = b"x") -> bytes:
    """A zip archive with entries of these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(600)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.pth", b"", "is empty"),
        ("page.pth", b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        ("page.safetensors", b"<html>", "HTML"),
        ("s3.pth", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML"),
        ("lfs.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("text.pt", b"hello", "neither a PyTorch checkpoint nor"),
        ("zeros.pth", bytes(2000), "neither a PyTorch checkpoint nor"),
        ("short.safetensors", b"abc", "not a valid safetensors file"),
        ("huge.safetensors", (2**62).to_bytes(8, "little") + b"{}", "not a valid safetensors file"),
        ("cut.pth", zipped("archive/data.pkl", "archive/data/0")[:-30], "damaged or truncated zip"),
        ("other.pth", zipped("readme.txt"), "no data.pkl"),
        ("script.pt", zipped("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"), "TorchScript"),
        ("program.pt2", zipped("m/models/model.json", "m/archive_format"), "exported PyTorch program"),
        ("k.h5", HDF5 + b"conv1_conv\0conv2_block1_0_conv\0conv2_block1_1_conv", "ResNet v1: the stride"),
        ("k.weights.h5", HDF5 + b"conv2_block1_1_conv", "biases, and its BatchNorm epsilon is 1.001e-5"),
        ("old.h5", HDF5 + b"res2a_branch2a", "ResNet v1"),
        ("k.keras", zipped("metadata.json", "config.json", "model.weights.h5", content=b'"conv2_block1_1_conv"'), "ResNet v1"),
        ("v2.h5", HDF5 + b"conv2_block1_1_conv\0conv2_block1_preact_bn", "pre-activation"),
        ("other.h5", HDF5, "Keras or other HDF5 file"),
        ("other.keras", zipped("metadata.json", "config.json", "model.weights.h5"), "Keras or other HDF5 file"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert reason in refusal(tmp_path / name)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x")
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert "decompression bomb" in refusal(tmp_path / "bomb.pth")


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "is a directory" in refusal(tmp_path)
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_real_keras_files_are_recognised_without_h5py(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py (comes with TensorFlow) writes the test file")
    with h5py.File(tmp_path / "resnet50.h5", "w") as file:
        for layer in ("conv1_conv", "conv2_block1_1_conv", "conv2_block1_1_bn"):
            file.create_dataset(f"model_weights/{layer}/{layer}/kernel", data=np.zeros((3, 3)), compression="gzip")
    assert "ResNet v1" in refusal(tmp_path / "resnet50.h5")


def test_safetensors_are_told_by_content(tmp_path: Path) -> None:
    weights = initialize.parity_weights(catalog.get_spec("mlp", hidden=(4,), image_size=4), 1, "float32")
    (tmp_path / "pytorch_model.bin").write_bytes(tensor_file.encode(weights))
    content = foreign_file.read(tmp_path / "pytorch_model.bin")
    assert sorted(content) == sorted(weights)
    assert all(np.array_equal(content[name], weights[name]) for name in weights)


# Files of PyTorch itself


@pytest.fixture(scope="module")
def torch() -> Any:
    """PyTorch, imported in the safe order; skipped where it is not installed."""
    if "pytorch" not in contract.installed():
        pytest.skip("pytorch is not installed")
    contract.load("pytorch")
    return pytest.importorskip("torch")


def small_net(torch: Any) -> Any:
    """A small model of plain torch layers."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin"])
def test_torch_files_old_and_new(torch: Any, tmp_path: Path, suffix: str, legacy: bool) -> None:
    net = small_net(torch)
    path = tmp_path / f"net{suffix}"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    imported = importers.to_canonical(foreign_file.read(path), "mlp")
    assert imported.spec == catalog.get_spec("mlp", hidden=(4,), image_size=4)
    assert np.array_equal(imported.weights["fc.weight"], net[3].weight.detach().numpy())


def test_a_training_checkpoint_with_plain_extras(torch: Any, tmp_path: Path) -> None:
    net = torch.nn.DataParallel(small_net(torch))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.zeros(2, 16)).sum().backward()
    optimizer.step()
    state = {"epoch": 3, "args": argparse.Namespace(lr=0.1, out=tmp_path), "state_dict": net.state_dict()}
    state |= {"optimizer": optimizer.state_dict(), "best": np.float64(91.7), "history": np.arange(3)}
    torch.save(state, tmp_path / "c.pth")
    imported = importers.to_canonical(foreign_file.read(tmp_path / "c.pth"), "mlp")
    assert np.array_equal(imported.weights["fc1.weight"], net.module[1].weight.detach().numpy())


def test_the_prefix_of_torch_compile(torch: Any, tmp_path: Path) -> None:
    net = small_net(torch)
    torch.save(torch.compile(net).state_dict(), tmp_path / "c.pth")
    imported = importers.to_canonical(foreign_file.read(tmp_path / "c.pth"), "mlp")
    assert imported.report.rows[0].source == "_orig_mod.1.weight"
    assert np.array_equal(imported.weights["fc.bias"], net[3].bias.detach().numpy())


def test_bfloat16_and_float16_become_float32(torch: Any, tmp_path: Path) -> None:
    net = small_net(torch)
    state = {name: tensor.to(torch.bfloat16 if name.startswith("1") else torch.float16) for name, tensor in net.state_dict().items()}
    torch.save(state, tmp_path / "c.pth")
    imported = importers.to_canonical(foreign_file.read(tmp_path / "c.pth"), "mlp")
    assert np.array_equal(imported.weights["fc1.weight"], state["1.weight"].float().numpy())
    assert "2 tensor(s): bfloat16 converted to float32" in imported.report.notes
    from safetensors.torch import save_file

    save_file(state, tmp_path / "c.safetensors")
    again = importers.to_canonical(foreign_file.read(tmp_path / "c.safetensors"), "mlp")
    assert all(np.array_equal(again.weights[name], imported.weights[name]) for name in again.weights)


class Malicious:
    """Unpickling it runs a command."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "nested"])
def test_code_in_a_file_is_never_run(torch: Any, tmp_path: Path, kind: str) -> None:
    victim, path = tmp_path / "pwned", tmp_path / "evil.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(victim)))
    else:
        content = {"state_dict": {**small_net(torch).state_dict(), "x": Malicious(victim)}} if kind == "nested" else Malicious(victim)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    message = refusal(path)
    assert not victim.exists()
    assert "refused" in message
    # A bare pickle, which torch.save never writes, is turned away before its first instruction.
    assert ("contains code" in message and "system" in message) == (kind != "pickle")


def test_whole_modules_and_scripts_are_refused(torch: Any, tmp_path: Path) -> None:
    torch.save(small_net(torch), tmp_path / "whole.pth")
    assert "contains code; refused" in refusal(tmp_path / "whole.pth")
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.98])
def test_truncated_torch_files(torch: Any, tmp_path: Path, legacy: bool, keep: float) -> None:
    path = tmp_path / "c.pth"
    torch.save(small_net(torch).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert re.search("truncated|refused", refusal(path))


def test_a_flipped_byte_in_the_weights_is_seen(torch: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    net = small_net(torch)
    torch.save(net.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[data.index(net[1].weight.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert "checksum" in refusal(path)


def test_views_cannot_unfold_into_memory(torch: Any, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1).expand(1 << 20, 1 << 20), "fc.bias": torch.zeros(10)}, tmp_path / "c.pth")
    content = foreign_file.read(tmp_path / "c.pth")
    assert isinstance(content["fc.weight"], str)
    with pytest.raises(InputRefused, match=r"missing: fc\.weight"):
        importers.to_canonical(content, "mlp")


def test_cycles_end(torch: Any, tmp_path: Path) -> None:
    state: dict[str, Any] = {"epoch": 1}
    state["model"] = state["net"] = state
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(InputRefused, match="holds no state dict"):
        importers.to_canonical(foreign_file.read(tmp_path / "c.pth"), "mlp")
