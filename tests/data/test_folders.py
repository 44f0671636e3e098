"""Class folders and the flat ImageNet layout: which class an image has, and what is never read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.core.errors import InputRefused, UsageError
from triptych.data import folders, imagenet, open_source

# The wnids of ids 1, 2 and 3 as the devkit orders them: kit fox, English setter, Siberian husky. Sorted, the order is 2, 3, 1.
DEVKIT = ["n02119789", "n02100735", "n02110185"]


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, "PNG")
    path.write_bytes(file.getvalue())
    return path


def flat(root: Path, numbers: list[int]) -> Path:
    for number in numbers:
        picture(root / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    return root


def classes_of(source: object) -> list[str]:
    return [source.classes[label] for label in source.labels]  # type: ignore[attr-defined]


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "b.PNG")
    picture(tmp_path / "cat" / "2.jpeg", 2)
    picture(tmp_path / "cat" / "1.png", 1)
    for ignored in ("notes.txt", ".hidden.png"):
        (tmp_path / "cat" / ignored).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.names == ["cat/1.png", "cat/2.jpeg", "dog/b.PNG"]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.image(1) == (tmp_path / "cat" / "2.jpeg").read_bytes()


@pytest.mark.parametrize("sub", ["val", "images", "validation", "test"])
def test_the_split_is_found_below(sub: str, tmp_path: Path) -> None:
    picture(tmp_path / sub / "cat" / "1.png")
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "train" / "cat" / "2.png")
    assert len(open_source(tmp_path, "test")) == 1
    assert len(open_source(tmp_path, "train")) == 2


@pytest.mark.parametrize("place", ["images", ""])
@pytest.mark.parametrize("keras", [False, True])
def test_classes_json_gives_the_indices(place: str, keras: bool, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "n3" / "1.png")
    picture(tmp_path / "images" / "n1" / "1.png")
    rows = [("n1", "one"), ("n2", "two"), ("n3", "three")]
    as_list = [{"index": i, "wnid": wnid, "name": name} for i, (wnid, name) in reversed(list(enumerate(rows)))]
    declared = {str(i): row for i, row in enumerate(rows)} if keras else as_list
    (tmp_path / place / "classes.json").write_text(json.dumps(declared))
    source = open_source(tmp_path)
    assert source.classes == ("n1", "n2", "n3")
    assert source.labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"index": 0, "wnid": "n1"}]', "classes n2 are not in classes.json"),
        ('[{"index": 1, "wnid": "n2"}]', r"indices must be 0 \.\.\. 0"),
        ('[{"index": 0, "wnid": "n2"}, {"index": 1, "wnid": "n2"}]', "each with its own identifier"),
        ("[3]", "not a list of"),
        ("{", "not a list of"),
    ],
)
def test_a_wrong_classes_json_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    picture(tmp_path / "n2" / "1.png")
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(InputRefused, match=reason):
        open_source(tmp_path)


def test_links_out_of_the_root_are_not_followed(tmp_path: Path) -> None:
    secret = picture(tmp_path / "outside" / "secret.png")
    root = tmp_path / "root"
    inside = picture(root / "cat" / "1.png")
    (root / "cat" / "2.png").symlink_to(secret)
    (root / "cat" / "3.png").symlink_to(inside)
    source = open_source(root)
    assert source.image(2) == inside.read_bytes()
    with pytest.raises(InputRefused, match=r"2\.png: a link that leads out"):
        source.image(1)
    (root / "dog").symlink_to(secret.parent)
    with pytest.raises(InputRefused, match="dog: a link that leads out"):
        open_source(root)


def test_flat_images_with_wnids(tmp_path: Path) -> None:
    root = flat(tmp_path / "val", [3, 1, 2])
    (tmp_path / "synset_labels.txt").write_text("\n".join(DEVKIT) + "\n")
    source = open_source(tmp_path)
    assert source.names == [path.name for path in sorted(root.iterdir())]
    assert classes_of(source) == DEVKIT
    assert source.labels.tolist() == [2, 0, 1]
    assert classes_of(open_source(root, ground_truth=tmp_path / "synset_labels.txt")) == DEVKIT


def test_a_part_of_the_official_set_finds_its_lines(tmp_path: Path) -> None:
    flat(tmp_path, [2, 3])
    (tmp_path / "synset_labels.txt").write_text("\n".join(DEVKIT))
    assert classes_of(open_source(tmp_path)) == DEVKIT[1:]
    flat(tmp_path, [4])
    (tmp_path / "ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(InputRefused, match="3 labels for 2 images"):
        open_source(tmp_path)


def test_named_lines_in_any_order(tmp_path: Path) -> None:
    flat(tmp_path, [1, 2])
    second, first = f"{DEVKIT[0]} 85 1 499 272 {DEVKIT[2]} 1 2 3 4", f"{DEVKIT[1]} 1 1 1 1"
    lines = f"ImageId,PredictionString\nILSVRC2012_val_00000002,{second}\nILSVRC2012_val_00000001,{first}\n"
    (tmp_path / "LOC_val_solution.csv").write_text(lines)
    assert classes_of(open_source(tmp_path)) == [DEVKIT[1], DEVKIT[0]]
    flat(tmp_path, [7])
    with pytest.raises(InputRefused, match=r"no label for ILSVRC2012_val_00000007\.JPEG"):
        open_source(tmp_path)


def test_devkit_ids_need_the_order_of_their_synsets(tmp_path: Path) -> None:
    flat(tmp_path, [1, 2, 3])
    truth, synsets = tmp_path / "ILSVRC2012_validation_ground_truth.txt", tmp_path / "order.txt"
    truth.write_text("3\n1\n1\n")
    synsets.write_text(f"{DEVKIT[0]} kit fox\n{DEVKIT[1]}, English setter\n{DEVKIT[2]}\n")
    with pytest.raises(InputRefused, match=r"ambiguous.*--synsets FILE"):
        open_source(tmp_path)
    source = open_source(tmp_path, ground_truth=truth, synsets=synsets)
    assert classes_of(source) == [DEVKIT[2], DEVKIT[0], DEVKIT[0]]


@pytest.mark.parametrize("wrong", ["0\n1\n2\n", "1\n2\n4\n"])
def test_ids_without_a_line_are_refused(wrong: str, tmp_path: Path) -> None:
    flat(tmp_path, [1, 2, 3])
    (tmp_path / "truth.txt").write_text(wrong)
    (tmp_path / "order.txt").write_text("\n".join(DEVKIT))
    with pytest.raises(InputRefused, match=r"ids (0|4) are not lines"):
        open_source(tmp_path, ground_truth=tmp_path / "truth.txt", synsets=tmp_path / "order.txt")


def test_the_devkits_ids_with_sorted_synsets_are_refused(tmp_path: Path) -> None:
    flat(tmp_path, [1, 2, 3, 4, 5])
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n171\n822\n297\n")
    (tmp_path / "synsets.txt").write_text("\n".join(imagenet.wnids()))
    with pytest.raises(InputRefused, match="sorted order"):
        open_source(tmp_path, synsets=tmp_path / "synsets.txt")


def test_the_devkits_meta_mat_is_read(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="scipy, which reads meta.mat, is not installed")
    row = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    rows = np.array([(2, DEVKIT[1], "b", 0), (1, DEVKIT[0], "a", 0), (1001, "n00001740", "entity", 2)], dtype=row)
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    scipy_io.savemat(devkit / "meta.mat", {"synsets": rows})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    flat(tmp_path / "val", [1, 2])
    assert classes_of(open_source(tmp_path)) == [DEVKIT[1], DEVKIT[0]]
    (devkit / "meta.mat").write_bytes(b"no")
    with pytest.raises(InputRefused, match=r"not the devkit's meta\.mat"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("n02119789\ncat food!\nn02119789\n", "line 2 is neither"),
        ("n02119789\n5\nn02119789\n", "mixes"),
        ("", "no label"),
        ("\xff", "not a text"),
    ],
)
def test_a_strange_ground_truth_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    flat(tmp_path, [1, 2, 3])
    (tmp_path / "truth.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputRefused, match=reason):
        open_source(tmp_path, ground_truth=tmp_path / "truth.txt")


def test_flat_images_without_labels_say_what_is_missing(tmp_path: Path) -> None:
    flat(tmp_path, [1])
    with pytest.raises(UsageError, match="--ground-truth FILE"):
        open_source(tmp_path)


def test_the_unlabeled_test_folder_of_imagenet_is_passed_over(tmp_path: Path) -> None:
    flat(tmp_path / "test", [1, 2])
    picture(tmp_path / "val" / "n01440764" / "1.png")
    assert len(open_source(tmp_path)) == 1


def test_what_holds_no_data_names_the_layouts(tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(InputRefused, match="no data set found there"):
        open_source(tmp_path)
    with pytest.raises(InputRefused, match="not a data set that Triptych reads"):
        open_source(tmp_path / "file.zip")
    with pytest.raises(UsageError, match="class folders"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown split 'dev'"):
        open_source("digits", "dev")


def test_imagenets_classes_are_sorted_and_complete() -> None:
    assert len(set(imagenet.wnids())) == 1000
    assert list(imagenet.wnids()) == sorted(imagenet.wnids())
    assert imagenet.classes()[65] == ("n01751748", "sea_snake")


def test_imagenets_classes_are_those_of_the_samples(real_data: Path) -> None:
    classes, _ = folders.read_classes(real_data / "imagenet-samples" / "classes.json")
    assert classes == imagenet.wnids()
    source = open_source(real_data / "imagenet-samples")
    assert len(source) == 200
    assert all(source.names[i].startswith(classes[source.label(i)]) for i in range(200))
