"""Files that are truncated, flipped, made up or made to harm: an error that names them, and nothing is executed."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _datasets import write_nyuv2, write_office_home
from _inputs import make_problem
from _published import published
from _sweeps import write_sweep
from matplotlib.figure import Figure
from PIL import Image
from scipy.io import savemat
from scipy.sparse import eye_array

from excessmtl_ext.data.multimnist import read_mnist
from excessmtl_ext.data.nyuv2 import read_frame
from excessmtl_ext.data.office_home import load_office_home, read_image
from excessmtl_ext.data.sarcos import load_sarcos
from excessmtl_ext.training import TrainConfig, TrainingInterrupted, train
from excessmtl_ext.training.pictures import report
from excessmtl_ext.training.pictures.paper import draw_paper_figures
from excessmtl_ext.training.pictures.report import read_content, render
from excessmtl_ext.training.pictures.runs import read_run
from excessmtl_ext.training.run.files import read_table
from excessmtl_ext.training.sweep.results import read_finished_run, read_results

NUM_MUTATIONS = 60

CONFIG = TrainConfig(
    dataset="digits",
    method="excessmtl-recommended",
    epochs=2,
    batch_size=50,
    lr=1e-3,
    num_train=100,
)


class RunsCode:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def mutations(content: bytes) -> list[bytes]:
    """Truncated, with flipped bits (most in the header, which decides what is read), and with parts repeated."""
    draw = random.Random(0)
    results = [content[: draw.randrange(len(content))] for _ in range(NUM_MUTATIONS // 3)]
    for number in range(NUM_MUTATIONS // 3):
        flipped = bytearray(content)
        for _ in range(1 + number % 4):
            flipped[draw.randrange(min(len(content), 200 if number % 3 else len(content)))] ^= (
                1 << draw.randrange(8)
            )
        results.append(bytes(flipped))
    for _ in range(NUM_MUTATIONS // 3):
        start, stop = sorted(draw.randrange(len(content)) for _ in range(2))
        results.append(content[:stop] + content[start:])
    return [*results, b"", b"\0" * 100, b"<!DOCTYPE html><html>404</html>", b"PK\3\4" + content]


def write_mnist_part(folder: Path) -> None:
    header = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in (20, 28, 28))
    (folder / "t10k-images-idx3-ubyte").write_bytes(header + bytes(range(256)) * 61 + bytes(64))
    header = bytes((0, 0, 8, 1)) + (20).to_bytes(4, "big")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(range(10)) * 2)


def write_sarcos_part(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 28))
    savemat(folder / "sarcos_inv.mat", {"sarcos_inv": rows[:40]}, do_compression=True)
    savemat(folder / "sarcos_inv_test.mat", {"sarcos_inv_test": rows[40:]})


def write_frame(folder: Path) -> None:
    write_nyuv2(folder, num_train=1, num_test=0, height=6, width=8)


def write_image(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.jpg")
    Image.fromarray(pixels).save(folder / "1.png")


FRAME = "nyuv2/train"
DATA_FILES: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any]]] = {
    "mnist images": (write_mnist_part, "t10k-images-idx3-ubyte", lambda f: read_mnist(f, "t10k")),
    "mnist labels": (write_mnist_part, "t10k-labels-idx1-ubyte", lambda f: read_mnist(f, "t10k")),
    "sarcos, compressed": (write_sarcos_part, "sarcos_inv.mat", load_sarcos),
    "sarcos": (write_sarcos_part, "sarcos_inv_test.mat", load_sarcos),
    "nyuv2 image": (write_frame, f"{FRAME}/image/0.npy", lambda f: read_frame(f / FRAME, 0)),
    "nyuv2 label": (write_frame, f"{FRAME}/label/0.npy", lambda f: read_frame(f / FRAME, 0)),
    "jpeg": (write_image, "1.jpg", lambda f: read_image(f / "1.jpg", 16)),
    "png": (write_image, "1.png", lambda f: read_image(f / "1.png", 16)),
}


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_damaged_data_file_is_read_or_is_an_error_that_names_it(
    tmp_path: Path, name: str
) -> None:
    write, file, read = DATA_FILES[name]
    write(tmp_path)
    path = tmp_path / file
    read(tmp_path)
    num_errors = 0
    for content in mutations(path.read_bytes()):
        path.write_bytes(content)
        try:
            read(tmp_path)
        except ValueError as error:
            num_errors += 1
            assert path.name in str(error), error
            assert str(error).startswith("Expected"), error
    assert num_errors > NUM_MUTATIONS // 3


def test_an_mnist_header_whose_size_overflows_is_an_error(tmp_path: Path) -> None:
    """2**32 - 2**16 and the like: products that are 0 modulo 2**64 would match an empty body."""
    write_mnist_part(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    sizes = (1 << 31, 1 << 31, 4)
    path.write_bytes(bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in sizes))
    with pytest.raises(
        ValueError, match=rf"Expected {path} to have 18,446,744,073,709,551,632 bytes"
    ):
        read_mnist(tmp_path, "t10k")


def test_mnist_labels_out_of_range_are_an_error(tmp_path: Path) -> None:
    write_mnist_part(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=rf"labels from 0 to 9 in {path}, but got up to 255"):
        read_mnist(tmp_path, "t10k")


@pytest.mark.filterwarnings("ignore:The default value for .spmatrix. is changing")  # of SciPy 1.18
def test_a_sparse_matrix_in_a_mat_file_is_an_error(tmp_path: Path) -> None:
    write_sarcos_part(tmp_path)
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": eye_array(28, format="csc")})
    with pytest.raises(ValueError, match=r"sarcos_inv.mat to be floating point \[N, 28\], but got"):
        load_sarcos(tmp_path)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-6, 8, 3), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (6, 8, 3), }\n",
        "__import__('os').mkdir('ran')\n",
    ],
    ids=["huge", "negative", "objects", "code"],
)
def test_a_hostile_npy_header_allocates_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_frame(tmp_path)
    path = tmp_path / FRAME / "image" / "0.npy"
    path.write_bytes(npy_header(header) + bytes(6 * 8 * 3 * 4))
    with pytest.raises(ValueError, match=rf"Expected {path} to be an array of numbers"):
        read_frame(tmp_path / FRAME, 0)
    assert not (tmp_path / "ran").exists()


def test_an_archive_in_place_of_an_array_is_an_error(tmp_path: Path) -> None:
    write_frame(tmp_path)
    path = tmp_path / FRAME / "image" / "0.npy"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside.npy", b"0" * 100)
    with pytest.raises(ValueError, match=rf"Expected {path} to be an array of numbers"):
        read_frame(tmp_path / FRAME, 0)


def test_nan_in_a_frame_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_frame(tmp_path)
    path = tmp_path / FRAME / "depth" / "0.npy"
    depth = np.load(path)
    depth[0, 0] = np.nan
    np.save(path, depth)
    with pytest.raises(ValueError, match=rf"Expected finite numbers in {path}, but 1 are not"):
        read_frame(tmp_path / FRAME, 0)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS"])
def test_an_image_of_another_format_is_refused_whatever_its_name_says(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "1.jpg"
    Image.new("RGB", (9, 9)).save(path, format=kind)
    with pytest.raises(ValueError, match=f"Expected {path} to be a JPEG or PNG image"):
        read_image(path, 8)


def test_an_image_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # as a bomb is to the real limit
    path = tmp_path / "1.png"
    Image.new("L", (100, 100)).save(path)
    with pytest.raises(ValueError, match=f"Expected {path} to be a JPEG.*decompression bomb"):
        read_image(path, 8)


@pytest.mark.parametrize(
    "line", [b"Art/../../secret.jpg 0", b"Art/Bed/\xff.jpg 0", b"Art/Bed/00000.jpg " + b"9" * 5000]
)
def test_a_hostile_split_list_is_an_error(tmp_path: Path, line: bytes) -> None:
    write_office_home(tmp_path / "images")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "Art_train.txt").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=rf"Expected .*{lists / 'Art_train.txt'}"):
        load_office_home(tmp_path / "images", split_lists=lists, image_size=8)


# ---- the files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(CONFIG, folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder: Path) -> None:
    train(dataclasses.replace(CONFIG, epochs=3), folder, resume=True)


def test_a_damaged_checkpoint_is_always_an_error(run: Path) -> None:
    """Also a single flipped bit of a tensor, which torch itself does not notice."""
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    weights = torch.load(path, weights_only=True)["model"]["encoder.1.weight"]
    flipped = bytearray(content)
    flipped[content.index(weights.numpy().tobytes()) + 1000] ^= 1
    draw = random.Random(0)
    damaged = [bytes(flipped)] + [content[: draw.randrange(len(content))] for _ in range(20)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"Expected {path} to be a checkpoint.*Delete the folder"
        ):
            resume(run)


def test_a_checkpoint_that_would_run_code_does_not(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoint.pt"
    for number, hostile in enumerate(
        (RunsCode(tmp_path / "0"), {"version": RunsCode(tmp_path / "1")})
    ):
        torch.save(hostile, path)
        with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint") as caught:
            resume(run)
        assert "weights_only" not in str(caught.value)  # torch's advice is to switch it off
        assert not (tmp_path / str(number)).exists()
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "2")))
    with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint"):
        resume(run)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("rows", [{"../outside.csv": 0}, {"metrics.csv": -1}, ["metrics.csv"]])
def test_a_checkpoint_names_no_file_outside_its_folder(run: Path, rows: Any) -> None:
    outside = run.parent / "outside.csv"
    outside.write_text("precious\nrows\n")
    path = run / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "num_rows": rows}, path)
    with pytest.raises(ValueError, match=f"Expected {path} to count the rows of metrics.csv"):
        resume(run)
    assert outside.read_text() == "precious\nrows\n"


def test_a_checkpoint_without_its_entries_or_of_another_model_is_an_error(run: Path) -> None:
    path = run / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("step", "model", "optimizer", "balancer", "cpu_generator", "weight_rows"):
        torch.save({key: value for key, value in checkpoint.items() if key != name}, path)
        with pytest.raises(
            ValueError, match=rf"the checkpoint in {run} to hold the state.*'{name}'"
        ):
            resume(run)
    model = {name: tensor[:1] for name, tensor in checkpoint["model"].items()}
    torch.save({**checkpoint, "model": model}, path)
    with pytest.raises(
        ValueError, match=rf"the checkpoint in {run} to hold the state.*size mismatch"
    ):
        resume(run)


def error_of(read: Callable[[Path], Any], folder: Path) -> str | None:
    try:
        read(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def read_all(folder: Path) -> None:
    """Everything that reads a finished run, drawings included."""
    read_run(folder)
    render(read_content(folder))
    read_finished_run(folder)
    resume(folder)


RUN_FILES = (
    "config.json",
    "environment.json",
    "metrics.json",
    "metrics.csv",
    "task_weights.csv",
    "times.csv",
)


@pytest.mark.parametrize("file", RUN_FILES)
def test_a_damaged_file_of_a_run_is_an_error_that_names_it(run: Path, file: str) -> None:
    path = run / file
    content = path.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"\xff\xfe" + content,
        b"[" * 100_000,
        b"[1]",
        b"{}",
        content.replace(b",", b",,"),
        b"",
    ):
        path.write_bytes(damaged)
        error = error_of(read_all, run)
        assert error is not None, f"{damaged[:40]!r} was read by all"
        assert str(path) in error or "checkpoint" in error, error
    path.unlink()
    path.mkdir()
    assert str(run) in str(error_of(read_all, run))


WRONG_VALUES = (None, True, -1, 0, 10**400, 1.5, float("nan"), "text", "", [], [1], {}, {"a": 1})


def changed_values(content: Any, draw: random.Random) -> Any:
    """A copy in which one value, somewhere, is of another type or size, or one entry is gone."""
    copy = json.loads(json.dumps(content))
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])

    collect(copy)
    container, key = draw.choice(places)
    if draw.random() < 0.25:
        del container[key]
    else:
        container[key] = draw.choice(WRONG_VALUES)
    return copy


def changed_cells(content: str, draw: random.Random) -> str:
    """A copy of a table in which one cell holds something else, or a line or a column is gone or there twice."""
    rows = [line.split(",") for line in content.splitlines()]
    row, column = draw.randrange(len(rows)), draw.randrange(len(rows[0]))
    kind = draw.randrange(4)
    if kind == 0:
        del rows[row]
    elif kind == 1:
        rows = [[cell for number, cell in enumerate(each) if number != column] for each in rows]
    elif kind == 2:
        rows.insert(row, rows[row])
    else:
        rows[row][column] = draw.choice(["nan", "inf", "-1", "0", "x", "", "1e400", '"', "1.5"])
    return "".join(",".join(each) + "\n" for each in rows)


def damaged_copies(path: Path, number: int) -> list[str]:
    draw = random.Random(path.name)
    text = path.read_text()
    if path.suffix == ".csv":
        return [changed_cells(text, draw) for _ in range(number)]
    return [json.dumps(changed_values(json.loads(text), draw)) for _ in range(number)]


@pytest.mark.parametrize("file", RUN_FILES)
def test_a_value_of_another_kind_in_a_file_of_a_run_is_read_or_an_error_that_names_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    # Drawing takes a second and meets the values as they are read.
    monkeypatch.setattr(report, "draw_curves", lambda run: str([run.weights, run.epochs]))
    num_errors = 0
    for number, damaged in enumerate(damaged_copies(finished / file, NUM_MUTATIONS)):
        folder = Path(shutil.copytree(finished, tmp_path / str(number)))
        (folder / file).write_text(damaged)
        for read in (read_run, lambda f: render(read_content(f)), read_finished_run, check_resume):
            error = error_of(read, folder)
            num_errors += error is not None
            assert error is None or str(folder) in error, error
    assert num_errors > NUM_MUTATIONS // 6


def check_resume(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=3)
    with pytest.raises(TrainingInterrupted):
        train(config, folder, resume=True, should_stop=lambda: True)


def test_a_damaged_table_says_after_which_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for damaged in (
        "epoch,loss\n1,0.5\n2\n",
        "epoch,loss\n1,0.5\n2,x\n",
        "epoch,loss\n1,0.5\n2,3,4\n",
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"Expected {path} to be a table .*after line [23] "):
            read_table(path)


SWEEP_FILES = ("sweep.json", "results.csv", "epochs.csv")


@pytest.mark.parametrize("file", SWEEP_FILES)
def test_a_damaged_file_of_a_sweep_is_an_error_that_names_it(tmp_path: Path, file: str) -> None:
    folder = write_sweep(tmp_path / "sweep", "multimnist", ["uniform"])
    read_results(folder)
    content = (folder / file).read_text()
    for damaged in (
        content[: len(content) // 2 + 3] + "\0,",
        content + "digits,uniform,,zero,,,,0\n{",
        "",
    ):
        (folder / file).write_text(damaged)
        with pytest.raises(ValueError, match=f"Expected {folder / file} to be"):
            read_results(folder)


@pytest.mark.parametrize("file", SWEEP_FILES)
def test_a_value_of_another_kind_in_a_file_of_a_sweep_is_drawn_or_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(
        Figure, "savefig", lambda *_, **__: None
    )  # the drawing itself takes a second
    methods = ["uniform", "excessmtl-official", "single-task"]
    whole = write_sweep(tmp_path / "whole", "multimnist", methods, num_seeds=1)
    num_errors = 0
    for number, damaged in enumerate(damaged_copies(whole / file, NUM_MUTATIONS)):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        (folder / file).write_text(damaged)

        def draw(folder: Path) -> None:
            draw_paper_figures(
                [read_results(folder)], folder / "figures", draw_toy=lambda path: None
            )

        error = error_of(draw, folder)
        num_errors += error is not None
        assert error is None or str(folder / file) in error or "epochs.csv" in error, error
    assert num_errors > NUM_MUTATIONS // 6


# ---- the state of a balancer


def test_a_damaged_balancer_state_is_refused_and_nothing_is_taken_over() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    for _ in range(2):
        balancer.backward(problem.losses())
    good = balancer.state_dict()
    before = {name: tensor.clone() for name, tensor in balancer.named_buffers()}
    nan = torch.full((3,), float("nan"), dtype=torch.float64)
    for change, message in (
        ({"task_weights": nan}, "`task_weights` without NaN"),
        ({"sq_grad_sum": good["sq_grad_sum"] * float("nan")}, "`sq_grad_sum` without NaN"),
        ({"num_steps": "many"}, "`num_steps` to be a tensor, but got str"),
        ({"_extra_state": None}, "`_extra_state` of a balancer"),
        ({"_extra_state": {"version": "new"}}, "`_extra_state` of a balancer"),
        ({"_extra_state": [1, 2]}, "`_extra_state` of a balancer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            balancer.load_state_dict({**good, **change})
        for name, tensor in balancer.named_buffers():
            assert torch.equal(tensor, before[name]), name
    balancer.load_state_dict(good)
