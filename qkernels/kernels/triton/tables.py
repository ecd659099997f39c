"""Tables of tiles that `qkernels tune` found faster than the kernels' own choice: JSON, a file for a GPU and a version of Triton.

    {"version": 1, "gpu": "NVIDIA H100 80GB HBM3", "triton": "3.6", "command": …, "date": …,
     "rows": [{"kernel", "format", "n", "k", "m", "tile": {every field of the kernel's Tile}, "us", "chosen_us"}]}

us and chosen_us: of the tile, and of the one that it replaces. `format` is "" where a kernel's tile does not depend on it. Looked for in
QKERNELS_TABLES (default ~/.cache/qkernels/tables), where `tune` writes, then among those that the package ships.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qkernels import config
from qkernels.kernels.triton.launch import Gpu, triton_version

log = logging.getLogger("qkernels")
T = TypeVar("T", bound=NamedTuple)
Row = dict[str, Any]
Table = dict[tuple[str, str, int, int], list[tuple[int, dict[str, Any]]]]  # kernel, format, n, k -> (m, tile), by m
VERSION = 1
SHIPPED = Path(__file__).parent / "tables"
MOST_BYTES = 16 << 20
_FIELDS = {"kernel": str, "format": str, "n": int, "k": int, "m": int, "tile": dict}


def tile_for(kernel: str, start: T, options: Mapping[str, tuple[Any, ...]], gpu: Gpu, format: str, n: int, k: int, m: int) -> T:
    """The tile of the tables for x [m, k] and a weight [n, k], or `start` where they have none.

    What was found for some number of rows serves fewer ones as well, down to half as many, or to one from 16 on.
    """
    for table in _tables(gpu.name) if gpu.name else ():
        for rows, tile in table.get((kernel, format, n, k), ()):
            if m <= rows <= max(16, 2 * m - 1) and tile.keys() == options.keys() and all(tile[f] in options[f] for f in options):
                return start._replace(**{f: options[f][options[f].index(tile[f])] for f in options})  # 16, where the file has 16.0
    return start


def file_name(gpu_name: str) -> str:
    """Of a GPU's table, for the Triton that is installed."""
    return f"{re.sub('[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}-triton{_version()}.json"


@functools.lru_cache(maxsize=8)
def _tables(gpu_name: str) -> list[Table]:
    """Of every file for the GPU. One that is wrong is named and left."""
    found = []
    for folder in (config.tables_folder(), SHIPPED):
        path = folder / file_name(gpu_name)
        try:
            rows = read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s is not used, tiles are chosen as without it: %s; `qkernels tune` writes a new one", path, error)
            continue
        table: Table = {}
        for row in sorted(rows, key=lambda row: row["m"]):
            table.setdefault((row["kernel"], row["format"], row["n"], row["k"]), []).append((row["m"], row["tile"]))
        found.append(table)
    return found


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError for one that is not as described above."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"it has {size} bytes; a table has at most {MOST_BYTES}")
    held = json.loads(path.read_text("utf-8"))
    if not isinstance(held, dict) or held.get("version") != VERSION or not isinstance(held.get("rows"), list):
        raise ValueError(f"it holds no version {VERSION} and rows")
    for row in held["rows"]:
        if not isinstance(row, dict) or any(type(row.get(field)) is not kind for field, kind in _FIELDS.items()):
            raise ValueError(f"a row is {str(row)[:80]}, not {', '.join(_FIELDS)}")
    return held["rows"]


def write(path: Path, rows: list[Row], **about: str) -> None:
    """Add rows to a file, each in place of one for the same kernel, format, shape and number of rows; one that is wrong starts anew."""
    try:
        held = {_key(row): row for row in read(path)}
    except (FileNotFoundError, ValueError, RecursionError):
        held = {}
    held |= {_key(row): row for row in rows}
    text = json.dumps({"version": VERSION, **about, "triton": _version(), "rows": [held[key] for key in sorted(held)]}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(file.name, path)
    _tables.cache_clear()


def _version() -> str:
    return "{}.{}".format(*triton_version())


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("kernel", "format", "n", "k", "m"))
