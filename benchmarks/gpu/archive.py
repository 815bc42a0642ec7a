"""What a campaign brings home: few files, each whole at any time.

    results.zip       all CSVs, plots, logs and campaign.json
    cache-<n>.zip     what was compiled (Triton, torch.compile, the native library), so that a call on a fresh machine
                      compiles nothing; in volumes, for what comes back from a machine is limited in size

Each is written beside itself and renamed. Triton notes absolute paths in its cache; they are written anew.
"""

import json
import os
import zipfile
from pathlib import Path

RESULTS = "results.zip"
VOLUME, VOLUMES = 15 << 20, 4  #: bytes of a cache volume, and how many there may be


def keep_results(out, folder):
    """Replace the archive of results by what is in `folder`."""
    _write(out / RESULTS, [(path, path.relative_to(folder)) for path in _files(folder)])


def keep_cache(out, folder):
    """Replace the volumes by what is in `folder`; how many files found no room.

    A folder's files stay together, and what torch.compile made comes last.
    """
    units = {}
    for path in sorted(_files(folder), key=lambda path: path.relative_to(folder).parts[0] == "inductor"):
        if not any(part.startswith("tmp.") for part in path.parts) and path.name != "lock":
            units.setdefault(path.parent, []).append(path)
    volumes, size, left_out = [[]], 0, 0
    for paths in units.values():
        weight = sum(_packed_size(path) for path in paths)
        if size and size + weight > VOLUME:
            volumes, size = [*volumes, []], 0
        if len(volumes) > VOLUMES or weight > VOLUME:
            left_out += len(paths)
            continue
        volumes[-1] += [(path, path.relative_to(folder)) for path in paths]
        size += weight
    for number, content in enumerate(volumes[:VOLUMES]):
        if content:
            _write(out / f"cache-{number}.zip", content)
    return left_out


def restore(source, results, cache):
    """Unpack what an earlier call left in the folder `source`; whether there was anything."""
    for archive, folder in [(source / RESULTS, results), *((path, cache) for path in source.glob("cache-*.zip"))]:
        if archive.is_file():
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
    for path in (cache / "triton").glob("*/__grp__*"):
        names = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))
    return (source / RESULTS).is_file()


def state(source):
    """campaign.json of the archive in a folder; of a campaign that has not begun if there is none."""
    path = source / RESULTS
    if not path.is_file():
        return {"calls": 0, "parts": []}
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("campaign.json"))


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


_sizes = {}


def _packed_size(path):
    """Bytes of a file once packed; remembered, for caches are packed again and again."""
    import zlib

    key = path, path.stat().st_size
    if key not in _sizes:
        _sizes[key] = len(zlib.compress(path.read_bytes(), 6)) + 2 * len(str(path)) + 200
    return _sizes[key]


def _write(path: Path, content):
    beside = path.with_name(f"{path.name}.part")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as file:
        for source, name in content:
            file.write(source, name)
    os.replace(beside, path)
