"""Results on disk: a `.npy` file, and beside it a journal of the tiles that are in it for good.

A tile is written to the file, the file is synchronised, and then a line in the journal says so, which is synchronised
in turn. A process that is killed at any moment leaves a journal whose lines are true, but for the last one, which may
be torn: it is cut off. Each line has a checksum of its tile; what is not found in the file as it says is computed
again.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path

import numpy as np

from ..errors import InputError
from .workers import missing

_EVERY = 1.0  # seconds between two synchronisations; what is lost at most
_FORMAT = 1


class Results:
    """An array that tiles are written to, in memory or on disk. Use as a context manager."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, width: int):
        """`shape` of the array, whose first axes are cells of `width` values each."""
        self.shape, self.dtype, self._width = shape, dtype, width
        self.done: dict[int, dict] = {}  #: {tile: {image: error}}
        self.found = 0  #: cells that were there when the run was resumed

    def put(self, tile: int, cells: np.ndarray, values: np.ndarray, errors: dict[int, str]) -> None:
        """Write the values [n, ...] of a tile to these cells."""
        raise NotImplementedError

    def array(self) -> np.ndarray:
        """All of it."""
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class InMemory(Results):
    """Nothing on disk."""

    def __init__(self, shape, dtype, width):
        super().__init__(shape, dtype, width)
        self._array = np.zeros(shape, dtype)
        missing(self._array)

    def put(self, tile, cells, values, errors):
        self._array.reshape(-1, self._width)[cells] = values.reshape(len(cells), self._width)
        self.done[tile] = errors

    def array(self):
        return self._array


class OnDisk(Results):
    """A `.npy` file and its journal, `<file>.journal`."""

    def __init__(self, path, shape, dtype, width, cells_of, fingerprint: dict[str, str], resume: bool):
        """`cells_of` gives the cells of each tile in turn, to look at what the journal says is there.

        Raises:
            FileExistsError: there is such a file and `resume` is not set. InputError: it is of another run, or no
            result. OSError: it cannot be written, or there is no room for it; nothing is left behind then.
        """
        super().__init__(shape, dtype, width)
        self.path, self.journal = Path(path), Path(f"{path}.journal")
        if self.path.suffix != ".npy":
            raise InputError(f"score: out={str(path)!r} must end in .npy: it is a NumPy array.")
        if not resume and (self.path.exists() or self.journal.exists()):
            raise FileExistsError(
                f"score: {self.path} or its journal is there already: pass resume=True to go on with it, another out=, "
                "or remove both."
            )
        self._lines, self._waiting, self._synced = None, [], time.monotonic()
        if self.journal.exists():
            self._open(fingerprint)
            self._replay(cells_of)
        else:
            if self.path.exists():
                raise InputError(f"score: {self.path} has no journal ({self.journal.name}), so nothing can be resumed.")
            self._create(fingerprint)

    def _create(self, fingerprint):
        made = []
        try:
            for path in (self.path, self.journal):
                path.open("xb").close()
                made.append(path)
            with open(self.path, "r+b") as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(self.dtype),
                    "fortran_order": False,
                    "shape": self.shape,
                }
                np.lib.format.write_array_header_2_0(file, header)
                self._start, total = file.tell(), int(np.prod(self.shape))
                # A file with holes would be found too large for its disk in the middle of the run.
                empty = np.zeros(min(total, 1 << 20), self.dtype)
                missing(empty)
                for start in range(0, total, len(empty) or 1):
                    file.write(empty[: total - start].tobytes())
                file.flush()
                os.fsync(file.fileno())
            self._file, self._lines = open(self.path, "r+b", buffering=0), open(self.journal, "r+b", buffering=0)
            self._append([json.dumps({"format": _FORMAT, "fingerprint": fingerprint})])
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            raise OSError(error.errno, f"score: {self.path} cannot be written: {error.strerror}") from error

    def _open(self, fingerprint):
        try:
            with open(self.path, "rb") as file:
                if (version := np.lib.format.read_magic(file)) != (2, 0):
                    raise ValueError(f"an array in version {version} of NumPy's format, not (2, 0)")
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
                self._start = file.tell()
            with open(self.journal, "rb") as file:
                first = json.loads(file.readline())
            theirs = first["fingerprint"]
            known = first["format"] == _FORMAT and isinstance(theirs, dict)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"score: {self.path} and its journal are no results that can be resumed: {error}"
            ) from error
        other = [name for name in fingerprint if not known or theirs.get(name) != fingerprint[name]]
        if other or (shape, dtype) != (self.shape, self.dtype):
            raise InputError(
                f"score: {self.path} was begun with other {', '.join(other) or 'sizes'}: nothing has been changed. Run "
                "it as it was begun, or pass another out=."
            )
        self._file, self._lines = open(self.path, "r+b", buffering=0), open(self.journal, "r+b", buffering=0)

    def _replay(self, cells_of):
        lines = self._lines.read().split(b"\n")
        good = len(lines[0]) + 1
        said = {}
        for line in lines[1:-1]:
            try:
                entry = json.loads(line)
                said[entry["tile"]] = entry["crc"], {int(i): str(e) for i, e in entry["errors"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            good += len(line) + 1
        self._lines.seek(good)
        self._lines.truncate()
        for tile, cells in cells_of() if said else ():
            if tile in said and zlib.crc32(self._read(cells)) == said[tile][0]:
                self.done[tile] = said[tile][1]
                self.found += len(cells)

    def _runs(self, cells):
        """(first place, first byte in the file, bytes) of runs of cells that lie in a row."""
        size = self._width * self.dtype.itemsize
        breaks = np.flatnonzero(np.diff(cells) != 1) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(cells)], strict=True):
            yield first * size, self._start + int(cells[first]) * size, (last - first) * size

    def _read(self, cells):
        return b"".join(os.pread(self._file.fileno(), size, at) for _, at, size in self._runs(cells))

    def put(self, tile, cells, values, errors):
        data = np.ascontiguousarray(values, self.dtype).tobytes()
        try:
            for start, at, size in self._runs(cells):
                os.pwrite(self._file.fileno(), data[start : start + size], at)
            self._waiting.append((tile, zlib.crc32(data), errors))
            if time.monotonic() - self._synced >= _EVERY:
                self._sync()
        except OSError as error:
            self._stop(error)

    def _sync(self):
        if self._waiting:
            os.fsync(self._file.fileno())
            self._append(
                json.dumps({"tile": tile, "crc": crc, "errors": errors}) for tile, crc, errors in self._waiting
            )
            self.done |= {tile: errors for tile, _, errors in self._waiting}
            self._waiting = []
        self._synced = time.monotonic()

    def _append(self, lines):
        data = "".join(f"{line}\n" for line in lines).encode()
        start = self._lines.tell()
        try:
            while data:
                data = data[self._lines.write(data) :]
            os.fsync(self._lines.fileno())
        except OSError:
            self._lines.seek(start)
            self._lines.truncate()
            raise

    def _stop(self, error):
        self._waiting = []
        raise OSError(
            error.errno,
            f"score: {self.path}: {error.strerror}. {len(self.done)} parts of the run are safe; when there is room, "
            "the same call with resume=True goes on from there",
        ) from error

    def array(self):
        try:
            self._sync()
        except OSError as error:
            self._stop(error)
        return np.load(self.path, mmap_mode="r")

    def __exit__(self, *error):
        if self._lines is None:
            return
        try:
            self._sync()
        except OSError as problem:
            if error[0] is None:
                self._stop(problem)
        finally:
            self._file.close()
            self._lines.close()
