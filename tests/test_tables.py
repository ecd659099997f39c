"""Tables of tiles: files that are whole, and files that are not."""

import json
import logging
from typing import NamedTuple

import pytest

from qkernels.kernels.triton import tables
from qkernels.kernels.triton.launch import Gpu


class Tile(NamedTuple):
    block_n: int = 64
    split_k: int = 1


OPTIONS = {"block_n": (64, 128), "split_k": (1, 2)}
GPU = Gpu(132, 227 << 10, early=True, name="NVIDIA H100 80GB HBM3")
NARROW, WIDE = Tile(64, 2), Tile(128, 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QKERNELS_TABLES", str(tmp_path / "tables"))
    monkeypatch.setattr(tables, "triton_version", lambda: (3, 6))
    tables._tables.cache_clear()
    yield tmp_path / "tables"
    tables._tables.cache_clear()


def row(m=1, tile=NARROW, **fields):
    return {"kernel": "gemm", "format": "int4", "n": 512, "k": 1024, "m": m, "tile": tile._asdict(), "us": 1.0, "chosen_us": 2.0, **fields}


def found(m=1, gpu=GPU, **fields):
    where = {"kernel": "gemm", "format": "int4", "n": 512, "k": 1024, **fields}
    return tables.tile_for(where["kernel"], Tile(), OPTIONS, gpu, where["format"], where["n"], where["k"], m)


def test_names():
    assert tables.file_name("NVIDIA H100 80GB HBM3").startswith("nvidia-h100-80gb-hbm3-triton")
    assert "/" not in tables.file_name("../../etc/passwd")


def test_a_row_serves_its_shape_and_some_fewer_rows(folder):
    tables.write(folder / tables.file_name(GPU.name), [row(1), row(16, WIDE), row(64), row(512, WIDE)], gpu=GPU.name)
    assert [found(m) for m in (1, 2, 16, 17, 32, 33, 64, 65, 256, 257, 512, 513)] == [
        NARROW, WIDE, WIDE, Tile(), Tile(), NARROW, NARROW, Tile(), Tile(), WIDE, WIDE, Tile(),
    ]  # fmt: skip
    assert {found(n=256), found(k=512), found(format="nf4"), found(kernel="other"), found(gpu=GPU._replace(name="other"))} == {Tile()}
    assert found(gpu=GPU._replace(name="")) == Tile()


def test_rows_are_added_and_replaced(folder):
    path = folder / tables.file_name(GPU.name)
    tables.write(path, [row(1), row(16)], gpu=GPU.name, command="qkernels tune", date="2026-11-26")
    assert found() == NARROW
    tables.write(path, [row(1, WIDE)], gpu=GPU.name)
    assert found() == WIDE and found(16) == NARROW
    assert [r["m"] for r in tables.read(path)] == [1, 16] and list(folder.iterdir()) == [path]


def test_the_users_own_come_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    name = tables.file_name(GPU.name)
    tables.write(tmp_path / "shipped" / name, [row(1, WIDE), row(64, WIDE)])
    assert found() == found(64) == WIDE
    tables.write(folder / name, [row(1)])
    assert found() == NARROW and found(64) == WIDE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": 2, "rows": []}',
        '{"version": 1}',
        '{"version": 1, "rows": [1]}',
        json.dumps({"version": 1, "rows": [row(), row(m="1")]}),
        json.dumps({"version": 1, "rows": [row(n=True)]}),
        json.dumps({"version": 1, "rows": [row(format=None)]}),
        json.dumps({"version": 1, "rows": [{**row(), "tile": [64, 1]}]}),
        " " * (tables.MOST_BYTES + 1),
        b"\xff\xfe".decode("latin1"),
    ],
)
def test_a_file_that_is_wrong_is_named_and_left(folder, caplog, text):
    folder.mkdir()
    (folder / tables.file_name(GPU.name)).write_bytes(text.encode("latin1"))
    with caplog.at_level(logging.WARNING, logger="qkernels"):
        assert found() == found() == Tile()
    [record] = caplog.records
    assert tables.file_name(GPU.name) in record.message and "is not used" in record.message
    tables.write(folder / tables.file_name(GPU.name), [row()])
    assert found() == NARROW, "a search may have taken hours: what it found is not lost"


def test_numbers_are_of_the_kernels_own_type(folder):
    tables.write(folder / tables.file_name(GPU.name), [{**row(), "tile": {"block_n": 128.0, "split_k": True}}])
    assert found() == Tile(128, 1) and all(type(value) is int for value in found())


@pytest.mark.parametrize(
    "tile", [{"block_n": 64}, {"block_n": 96, "split_k": 1}, {"block_n": 64, "split_k": [1]}, {**WIDE._asdict(), "x": 1}]
)
def test_tiles_of_another_version_are_passed_over(folder, tile):
    tables.write(folder / tables.file_name(GPU.name), [{**row(), "tile": tile}])
    assert found() == Tile()
