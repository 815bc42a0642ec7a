"""The GPU campaign, dry: every part on CPU tensors writes its rows; what is brought home is few files; what is said of
it before it runs."""

import json
import re

import pytest
import torch
from support.campaign import rows, unpacked

from benchmarks import table
from benchmarks.gpu import archive, tables, variants, worker
from benchmarks.gpu import campaign as gpu_campaign
from benchmarks.gpu import plot as gpu_plot

pytestmark = pytest.mark.xdist_group("campaign")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of what a dry run of the command brings home, unpacked; its exit status; the files it left."""
    out, found = tmp_path_factory.mktemp("campaign"), tmp_path_factory.mktemp("found")
    status = gpu_campaign.main(["--out", str(out), "--dry-run"])
    unpacked(out, found)
    return found, status, sorted(path.name for path in out.iterdir())


def test_one_process_runs_all_of_these(request):
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@campaign"), "pytest-xdist keeps no groups: each process makes its own"


def test_every_part_succeeds(dry):
    found, status, _ = dry
    state = json.loads((found / "campaign.json").read_text())
    assert {r["part"]: r["status"] for r in state["parts"]} == dict.fromkeys(
        [*gpu_campaign.PARTS, gpu_campaign.NATIVE], "ok"
    ), (found / "log.txt").read_text()[-3000:]
    assert status == 0 and state["dry_run"] is True
    (where,) = json.loads((found / "environment.json").read_text()).values()
    assert {"device", "numpy", "versions"} <= set(where)
    (ceilings,) = json.loads((found / "ceilings.json").read_text()).values()
    assert {"copy", "bfloat16", "launch", "latency"} <= set(ceilings)


def test_few_files_come_home_and_hold_what_was_promised(dry):
    found, _, files = dry
    assert files == [archive.RESULTS]  # no cache: an interpreter compiles nothing
    assert 1 + archive.VOLUMES + 1 <= 8  # one that is being written may be left by a cut
    names = {path.name for path in found.iterdir()}
    assert names >= {f"{name}.{kind}" for name in gpu_plot.TITLES for kind in ("csv", "png")}
    assert names >= {"campaign.json", "environment.json", "ceilings.json", "winners.json", "log.txt", "build.txt"}
    assert names >= {"correctness.csv", "energy.csv", "profile.csv", "profile.txt", "pytest.txt", "tables.txt"}


def test_the_table_names_every_case_and_comes_last(dry):
    text = (dry[0] / "tables.txt").read_text()
    for name in ("kernels", "models", "models_compiled", "models_winners", "training", "alignment"):
        assert all(row["case"] in text and row["provider"] in text for row in rows(dry[0], name))
    assert "0 out of budget" in text.splitlines()[0]
    assert len(text) < 12000  # as much of the end of an output as may be all that is seen


@pytest.mark.parametrize(
    "name, providers",
    [
        ("ceilings", {"torch"}),
        ("kernels", {"eager", "eager_padded", "sdpa_padded", "sdpa_nested", "compiled", "conv2d", "reference", "ours"}),
        (
            "models",
            {"hf_eager", "hf_bf16", "sdpa_compile_bf16", "ours_float32", "ours_bfloat16", "ours_graphs_bfloat16",
             "ours_float8", "ours_graphs_float8"},
        ),
        ("models_compiled", {"hf_eager", "hf_compile_bf16", "ours_graphs_bfloat16"}),
        ("models_winners", {"hf_eager", "ours_graphs_bfloat16", "ours_bfloat16"}),
        (
            "models_launches",
            {"hf_eager", variants.FORWARD, *(f"{variants.FORWARD}_{name}" for name in variants.WHOLE)},
        ),
        ("training", {"hf_autocast", "ours_autocast"}),
        ("alignment", {"loop", "triton"}),
        ("retrieval", {"hf_eager", "hf_bf16", "ours_bfloat16"}),
    ],
)  # fmt: skip
def test_rows_are_those_of_the_other_benchmarks(dry, name, providers):
    found = rows(dry[0], name)
    assert tuple(found[0]) == worker.FIELDS and worker.FIELDS[: len(table.FIELDS)] == table.FIELDS
    assert {row["provider"] for row in found} >= providers
    keys = [tuple(row[column] for column in worker.KEY) for row in found]
    assert len(set(keys)) == len(keys)
    optional = {"peak_mib", "forward_mib", "commit", "error", "shape", "backend", "model", "gpu_ms"}
    for row in found:
        assert all(row[field] for field in worker.FIELDS if field not in optional), row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0 and row["timed"] == "wall"


def test_the_strongest_peer_comes_first_and_each_variant_beside_what_ships(dry):
    assert rows(dry[0], "models")[0]["provider"] == "sdpa_compile_bf16"
    by_case = {}
    for row in rows(dry[0], "kernels"):
        by_case.setdefault(row["case"], set()).add(row["provider"])
    for op, some in variants.VARIANTS.items():
        assert by_case[f"{op} b1"] >= {"ours", *(f"ours {name}" for name in some)}
    assert by_case["linear qkv b1"] >= {"eager", "eager one_product", "ours", "ours three_launches", "ours one_product"}


def test_ours_are_as_right_as_their_peers(dry):
    """In each group and dtype our error is at most twice the worst of the others, plus a rounding."""
    for name in ("kernels", "models", "models_compiled", "models_winners", "models_launches", "alignment"):
        groups = {}
        for row in rows(dry[0], name):
            groups.setdefault((row["case"], row["dtype"]), []).append(row)
        for (case, dtype), group in groups.items():
            if (
                name in ("models_compiled", "models_winners", "models_launches") and dtype == "float32"
            ):  # only the base of the ratios
                assert {row["provider"] for row in group} == {"hf_eager"}
                continue
            if dtype == "float8":  # nobody else computes in it; tests/test_quantization.py holds it to its emulation
                continue
            if name in ("models_winners", "models_launches"):  # ours alone, which `models` holds to their peers
                assert all(row["provider"].startswith(tables.OURS) for row in group)
                continue
            rated = [row for row in group if row["provider"] != "conv2d"]  # which leaves out half of the work
            ours = [float(row["error"]) for row in rated if row["provider"].startswith(tables.OURS)]
            peers = [float(row["error"]) for row in rated if not row["provider"].startswith(tables.OURS)]
            allowed = 2 * max(peers) + torch.finfo(getattr(torch, dtype)).eps
            assert ours and max(ours) <= allowed, (name, case, dtype, ours, peers)


def test_every_op_and_batch_is_there(dry):
    cases = {row["case"] for row in rows(dry[0], "kernels")}
    ops = ("attention", "attention_bwd", "linear qkv", "linear out", "linear fc2", "linear_gelu", "add_layer_norm")
    ops += ("text_embed", "patch_embed", "linear_cross_entropy_bwd", "linear out norm", "linear fc2 norm")
    ops += ("add_layer_norm_fp8", "linear_gelu_fp8")
    assert cases == {f"{op} {batch}" for op in ops for batch in ("b1", "b2")}
    checked = rows(dry[0], "correctness")
    assert {row["op"] for row in checked} == {
        "model in graphs",
        *("attention", "patch_embed", "text_embed", "add_layer_norm", "linear", "linear_gelu", "linear_cross_entropy"),
        *("linear_qkv", "linear_fp8", "linear_gelu_fp8", "add_layer_norm_fp8"),
        *("word_patch_distance", "ipot", "sinkhorn"),
    }
    assert all(row["within"] == "True" for row in checked)
    assert sum(row["quantity"].startswith("gradient") for row in checked) > 40
    assert "skipped" in (dry[0] / "pytest.txt").read_text()
    assert {row["provider"] for row in rows(dry[0], "energy")} >= {"hf_bf16", "ours_bfloat16"}
    kernels = {row["kernel"] for row in rows(dry[0], "profile") if row["provider"] == "ours_float32"}
    assert any(name.startswith("vilt_fast::") for name in kernels)


def test_plots_are_drawn_from_the_csvs(dry):
    for name in gpu_plot.TITLES:
        assert (dry[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# --- before anything runs ---------------------------------------------------------------------------------------------


def test_a_plan_fits_the_calls_and_does_nothing(tmp_path, capsys):
    assert gpu_campaign.main(["--out", str(tmp_path / "none"), "--plan"]) == 0
    assert not (tmp_path / "none").exists()
    text = capsys.readouterr().out
    assert re.findall(r"^call (\d), (\d) minutes", text, re.MULTILINE) == [("1", "6"), ("2", "9"), ("3", "9")]
    assert all(f"  {name} " in text for name in gpu_campaign.PARTS)
    calls = gpu_campaign.plan(gpu_campaign.PARTS, ())
    for minutes, call in zip(gpu_campaign.MINUTES, calls, strict=True):
        assert sum(call.values()) + gpu_campaign.RESERVE <= 60 * minutes < 600
    every = [name for name, part in gpu_campaign.PARTS.items() if part.every]
    for name, part in gpu_campaign.PARTS.items():  # whole, in one call, in the order of their worth
        assert [call[name] for call in calls if name in call] == [part.most] * (3 if name in every else 1), name
    assert [name for call in calls for name in call if name not in every] == [
        name for name in gpu_campaign.PARTS if name not in every
    ]
    assert {"compilation", "correctness", "tests", "sanitizer"} < set(calls[0])
    assert {"kernels", "models"} < set(calls[1])
    done = [name for name in gpu_campaign.PARTS if name not in every]
    assert "Nothing is missing." in gpu_campaign.planned(gpu_campaign.PARTS, 3, done)


def test_exit_status_and_bad_arguments(monkeypatch, tmp_path, capsys):
    for status, wanted in {"ok": 0, "skipped": 0, "incomplete": 0, "failed": 1, "cut": 1}.items():
        monkeypatch.setattr(gpu_campaign, "campaign", lambda *_, status=status, **__: [{"status": status}])
        assert gpu_campaign.main(["--out", str(tmp_path)]) == wanted
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path, there):
        (folder / archive.RESULTS).write_bytes(b"")
    for argv in (
        [], ["--out", "x", "--minutes", "0"], ["--out", "x", "--parts", "nonsense"],
        ["--out", "x", "--resume", str(tmp_path / "nowhere.zip")], ["--out", str(tmp_path), "--resume", str(there)],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            gpu_campaign.main(argv)
    said = capsys.readouterr().err
    assert "nonsense" in said and "nowhere.zip" in said and "results of another call" in said
