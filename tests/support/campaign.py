"""What a GPU campaign brings home, read back."""

import zipfile

from benchmarks import table
from benchmarks.gpu import archive


def unpacked(out, folder):
    with zipfile.ZipFile(out / archive.RESULTS) as file:
        assert file.testzip() is None
        file.extractall(folder)


def rows(out, name):
    return table.read(out / f"{name}.csv")


def records(out):
    return archive.state(out)["parts"]
