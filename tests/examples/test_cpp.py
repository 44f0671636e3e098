"""The C++ programs of examples/cpp against Python: what goes into a model, what comes out of it, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core import catalog, checkpoint, contract, initialize
from triptych.core.difference import scaled_error
from triptych.core.spec import Preprocessing, StageSpec
from triptych.core.tolerance import EXPORTED, PREPARED
from triptych.data import images as image_files
from triptych.export import matrix, session

IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocessing(None, 28, (0.13,), (0.31,))
PROGRAMS = {
    "torchscript": "classify_libtorch", "aotinductor": "classify_libtorch", "onnx": "classify_openvino", "openvino": "classify_openvino",
}  # fmt: skip


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Of a C++ program."""
    return subprocess.run([program, *map(str, arguments)], capture_output=True, timeout=60, check=False)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on them: what a resize can be told from another by."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x / 9 + seed)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 20, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JPEG files of every kind that is taken: sizes, subsampling, progressive, grey, and held in each of the eight ways."""
    folder = tmp_path_factory.mktemp("photographs")
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "wide": (picture(300, 420), {}),
        "tall": (picture(501, 333), {"quality": 95, "subsampling": 0}),
        "large": (picture(1100, 1500), {"quality": 60}),
        "small": (picture(31, 40), {"subsampling": 1}),
        "sliver": (picture(3, 300), {}),
        "dot": (picture(1, 1), {}),
        "exact": (picture(256, 256), {}),
        "progressive": (picture(299, 270), {"progressive": True}),
        "grey": (picture(280, 290).convert("L"), {}),
    }
    for way in range(1, 10):  # 9 is none, and ignored
        exif = Image.Exif()
        exif.endian = "<>"[way % 2]
        exif[0x0112] = way
        made[f"held_{way}"] = (picture(60, 90, way), {"exif": exif})
    for name, (image, options) in made.items():
        image.save(folder / f"{name}.jpg", **options)
    return {name: folder / f"{name}.jpg" for name in made}


# --- What goes in -------------------------------------------------------------------------------------------------------------------


def recorded(folder: Path, preprocessing: Preprocessing, source: str = "pytorch") -> Path:
    """A directory with what the programs read of an export.json."""
    spec = {"num_classes": 10, "preprocessing": dataclasses.asdict(preprocessing)}
    folder.mkdir(exist_ok=True)
    (folder / "export.json").write_text(json.dumps({"schema": 1, "source": source, "format": "onnx", "spec": spec}))
    return folder


def in_python(file: Path, given: Preprocessing) -> np.ndarray:
    """(crop, crop, C), by PyTorch's room."""
    if "pytorch" not in contract.installed():
        pytest.skip("pytorch is not installed")
    room = contract.load("pytorch")
    return room.preprocess(room.decode(image_files.vet(file.read_bytes(), file.name, given.channels), given.channels), given)


def in_cpp(prepare: Path, folder: Path, file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """What `prepare` writes."""
    done = run(prepare, folder, file)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(shape)


@pytest.mark.parametrize("given", [IMAGENET, GREY], ids=["imagenet", "grey"])
def test_images_are_prepared_as_in_python(given: Preprocessing, prepare: Path, photographs: dict[str, Path], tmp_path: Path) -> None:
    first, last = recorded(tmp_path / "first", given), recorded(tmp_path / "last", given, "jax")
    for name, file in photographs.items():
        expected = in_python(file, given)
        shape = (given.channels, given.crop, given.crop)
        prepared = in_cpp(prepare, first, file, shape).transpose(1, 2, 0)
        assert scaled_error(prepared, expected) <= PREPARED, name
        assert np.array_equal(in_cpp(prepare, last, file, expected.shape), prepared), name


def test_real_images_are_prepared_as_in_python(programs: Path, real_data: Path, tmp_path: Path) -> None:
    files = sorted((real_data / "imagenet-samples" / "images").rglob("*.JPEG"))[::4]
    assert len(files) >= 20
    folder = recorded(tmp_path / "imagenet", IMAGENET)
    errors = {
        file.name: scaled_error(in_cpp(programs / "prepare", folder, file, (3, 224, 224)).transpose(1, 2, 0), in_python(file, IMAGENET))
        for file in files
    }
    assert max(errors.values()) <= PREPARED, errors


# --- What comes out -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small ResNet that resizes and crops as ImageNet's do, with labels, and logits that tell its classes apart."""
    spec = catalog.tiny(catalog.get_spec("resnet18"))
    spec = dataclasses.replace(spec, stages=(StageSpec(1, 8, 1),))
    values = dict(initialize.parity_weights(spec, 0, "float32"))
    values["fc.weight"] = values["fc.weight"] * np.float32(5)
    return checkpoint.save(tmp_path_factory.mktemp("weights") / "small", spec, values, labels=[f"label {i}" for i in range(10)])


@pytest.fixture(scope="module")
def exported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `triptych export --from pytorch` writes of it, in every format that the programs run."""
    cells = matrix.chosen(["pytorch"], list(PROGRAMS))
    reason = next((reason for cell in cells if (reason := cell.missing())), None)
    if reason:
        pytest.skip(reason)
    loaded, out = checkpoint.load(weights), tmp_path_factory.mktemp("exported")
    rows = session.run(session.Request(catalog.fed_by_images(loaded.spec), loaded.weights, tuple(cells), out), lambda text: None)
    assert session.outcome(rows) is None
    return out


@pytest.fixture(scope="module")
def real_photographs() -> list[Path]:
    """Some of the ImageNet samples, where they are."""
    folder = Path(os.environ.get("TRIPTYCH_DATA", "nowhere")) / "imagenet-samples" / "images"
    return sorted(folder.rglob("*.JPEG"))[::20]


@pytest.fixture(scope="module")
def predicted(weights: Path, photographs: dict[str, Path], real_photographs: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The top five of `triptych predict --framework pytorch`, by file."""
    command = [sys.executable, "-m", "triptych.cli", "predict", "--weights", str(weights), "--framework", "pytorch", "--json"]
    done = subprocess.run([*command, *map(str, [*photographs.values(), *real_photographs])], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rows = {row["image"]: row["predictions"]["pytorch"] for row in json.loads(done.stdout)["images"]}
    assert len({round(row[0]["probability"], 3) for row in rows.values()}) > 3, "one answer for every image would prove little"
    return rows


def answered(printed: str) -> dict[str, list[dict[str, Any]]]:
    """What a program prints: a line for each image, and below it a line for each class."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for line in printed.splitlines():
        if not line.startswith("  "):
            answers[line] = []
            continue
        probability, number, *label = line.split(maxsplit=2)
        answers[list(answers)[-1]].append({"probability": float(probability), "class": int(number), "label": "".join(label)})
    return answers


@pytest.mark.parametrize("form", PROGRAMS)
def test_a_program_prints_what_python_does(
    form: str, programs: Path, exported: Path, weights: Path, photographs: dict[str, Path], real_photographs: list[Path],
    predicted: dict[str, list[dict[str, Any]]],
) -> None:  # fmt: skip
    files = [*photographs.values(), *real_photographs]
    done = run(programs / PROGRAMS[form], exported / f"pytorch-{form}", "--labels", weights / "config.json", *files)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    answers = answered(done.stdout.decode())
    assert list(answers) == [str(file) for file in files]
    for name, rows in answers.items():
        expected = predicted[name]
        assert [(row["class"], row["label"]) for row in rows] == [(row["class"], row["label"]) for row in expected]
        assert len(rows) == 5
        for row, right in zip(rows, expected, strict=True):
            assert abs(row["probability"] - right["probability"]) <= EXPORTED["float32"]


# --- What is refused ----------------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def sized(width: int, height: int) -> bytes:
    """A small JPEG whose header tells of a large image."""
    data = bytearray(jpeg(picture(16, 16)))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def with_scans(count: int) -> bytes:
    """Eight by eight grey pixels, progressive, whose scan of the DC coefficient comes again and again."""
    data = jpeg(Image.new("L", (8, 8), 128)).replace(b"\xff\xc0", b"\xff\xc2")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00\x3f"  # DC alone, in full; a difference of 0 is the code 00 of the standard table
    return data[: data.index(b"\xff\xda")] + count * scan + b"\xff\xd9"


WHOLE = jpeg(picture(64, 80))
REFUSED_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a JPEG by its content"),
    "page": (b"<html>", "not a JPEG by its content"),
    "cut in its header": (WHOLE[:200], "Premature end of"),
    "cut": (WHOLE[: len(WHOLE) // 2], "Premature end of JPEG file"),
    "ended early": (WHOLE[:-60] + WHOLE[-2:], "Corrupt JPEG data: premature end of data segment"),
    "four inks": (jpeg(picture(20, 20).convert("CMYK")), "neither RGB nor grey; convert it first"),
    "a bomb": (sized(65500, 65500), "65500 x 65500 pixels are more than 64 million; scale it down first"),
    "a thread": (sized(16, 1601), "16 x 1601 is more than 100 times longer than wide; crop it first"),
    "many scans": (with_scans(501), "more than 500 scans"),
}


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_an_image_is_refused_with_the_reason(name: str, prepare: Path, tmp_path: Path) -> None:
    data, reason = REFUSED_IMAGES[name]
    file = tmp_path / "image.jpg"
    file.write_bytes(data)
    done = run(prepare, recorded(tmp_path / "record", GREY), file)
    assert done.returncode == 8
    assert done.stdout == b""
    assert done.stderr.decode().startswith(f"{file}: {reason}")


def test_what_is_not_refused_by_a_hair(prepare: Path, tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(with_scans(500))
    assert run(prepare, recorded(tmp_path / "record", GREY), file).returncode == 0


def test_no_file_no_regular_file_and_one_too_large(prepare: Path, tmp_path: Path) -> None:
    folder = recorded(tmp_path / "record", GREY)
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    told = {"missing.jpg": "No such file", "record": "Is a directory", "pipe": "not supported", "large.jpg": "larger than 64 MiB"}
    for name, reason in told.items():
        done = run(prepare, folder, tmp_path / name)
        assert done.returncode == 8
        assert reason in done.stderr.decode()


def test_damaged_images_are_answered_or_refused_and_nothing_else(prepare: Path, tmp_path: Path) -> None:
    """Under the sanitizers: none reads beyond its bytes, EXIF included."""
    chance, file, folder = random.Random(0), tmp_path / "image.jpg", recorded(tmp_path / "record", GREY)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [jpeg(picture(24, 30), exif=exif, **options) for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95})]
    codes = []
    for _ in range(150):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 3, 10))):
            at = chance.randrange(chance.choice((40, 700, len(data))))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
        file.write_bytes(data)
        done = run(prepare, folder, file)
        assert done.returncode in (0, 8), done.stderr.decode()
        codes.append(done.returncode)
    assert set(codes) == {0, 8}


def test_a_record_that_is_none_is_refused(prepare: Path, tmp_path: Path) -> None:
    folder, image = recorded(tmp_path / "record", IMAGENET), tmp_path / "image.jpg"
    image.write_bytes(WHOLE)
    good = (folder / "export.json").read_text()
    told = {
        "": "empty",
        good[:-40]: "damaged in line",
        "[" * 100_000: "not JSON",
        '{"schema": &a 1, "b": *a}': "not JSON",
        good.replace('"schema": 1', '"schema": 2'): "schema 2; this program reads schema 1",
        good.replace('"crop": 224', '"crop": 257'): "spec.preprocessing.resize_short_side is 256, which is not possible",
        good.replace('"crop": 224', '"crop": 1e99'): "spec.preprocessing.crop is 1e99, which is not possible",
        good.replace('"crop": 224', '"crop": null'): "no spec.preprocessing.crop",
        good.replace("[0.229, 0.224, 0.225]", "[0.2, 0.2]"): "mean and std are not those of 1 (grey) or 3 (RGB) channels",
    }
    for text, reason in told.items():
        (folder / "export.json").write_text(text)
        done = run(prepare, folder, image)
        assert done.returncode == 8, text
        assert reason in done.stderr.decode()
    assert b"export.json: No such file" in run(prepare, tmp_path, image).stderr


def test_a_model_that_is_none_is_refused_and_good_images_are_answered_beside_bad_ones(
    programs: Path, exported: Path, photographs: dict[str, Path], tmp_path: Path
) -> None:
    image = photographs["wide"]
    for form, program in PROGRAMS.items():
        folder = tmp_path / form
        shutil.copytree(exported / f"pytorch-{form}", folder)
        done = run(programs / program, folder, "missing.jpg", image)
        assert (done.returncode, len(answered(done.stdout.decode())[str(image)])) == (8, 5)
        assert done.stderr == b"missing.jpg: No such file or directory\n"
        record = (folder / "export.json").read_text()
        (folder / "export.json").write_text(record.replace('"num_classes": 10', '"num_classes": 11'))
        assert b"10 logits; export.json tells 11" in refused(programs / program, folder, image)
        (folder / "export.json").write_text(record.replace(f'"format": "{form}"', '"format": "tflite"'))
        assert b"holds tflite; this program runs " in refused(programs / program, folder, image)
        (folder / "export.json").write_text(record)
        (model,) = [file for file in folder.iterdir() if file.suffix in (".pt", ".pt2", ".onnx", ".xml")]
        model.write_bytes(model.read_bytes()[:1000])
        assert str(model).encode() in refused(programs / program, folder, image)
    assert run(programs / program, folder).returncode == 2


def refused(program: Path, *arguments: object) -> bytes:
    """What is printed, in few words, by a program that ends with exit code 8."""
    done = run(program, *arguments)
    assert done.returncode == 8
    assert done.stdout == b""
    assert len(done.stderr) < 1000
    return done.stderr
