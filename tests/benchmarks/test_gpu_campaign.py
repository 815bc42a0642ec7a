"""The GPU campaign, dry: every part on CPU tensors writes its rows; failures are recorded; the clock is kept."""

import csv
import json

import pytest
import torch

from benchmarks import run
from benchmarks.gpu import campaign as gpu_campaign
from benchmarks.gpu import plot as gpu_plot
from benchmarks.gpu import timing as gpu_timing

pytestmark = pytest.mark.xdist_group("campaign")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder that a dry run of the command leaves, and its exit status."""
    out = tmp_path_factory.mktemp("campaign")
    status = gpu_campaign.main(["--out", str(out), "--dry-run"])
    return out, status


def rows(out, name):
    with open(out / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def records(out):
    return json.loads((out / "campaign.json").read_text())["parts"]


def test_every_part_succeeds(dry):
    out, status = dry
    assert {r["part"]: r["status"] for r in records(out)} == dict.fromkeys(
        [*gpu_campaign.PARTS, gpu_campaign.NATIVE], "ok"
    ), (out / "log.txt").read_text()[-3000:]
    assert status == 0
    assert json.loads((out / "campaign.json").read_text())["dry_run"] is True
    assert "device" in json.loads((out / "environment.json").read_text())
    assert {"copy", "bfloat16", "launch"} <= set(json.loads((out / "ceilings.json").read_text()))


@pytest.mark.parametrize(
    "name, providers",
    [
        ("ceilings", {"torch"}),
        ("kernels", {"eager", "eager_padded", "sdpa_padded", "sdpa_nested", "compiled", "conv2d", "reference", "ours"}),
        (
            "models",
            {"hf_eager", "hf_bf16", "ours_float32", "ours_bfloat16", "ours_graphs_bfloat16", "ours_float8"},
        ),
        ("models_compiled", {"hf_eager", "hf_compile_bf16", "sdpa_compile_bf16", "ours_bfloat16"}),
        ("training", {"hf_autocast", "ours_autocast"}),
        ("alignment", {"loop", "triton"}),
        ("retrieval", {"hf_eager", "hf_bf16", "ours_bfloat16"}),
    ],
)
def test_rows_are_those_of_the_other_benchmarks(dry, name, providers):
    found = rows(dry[0], name)
    assert tuple(found[0]) == run.FIELDS
    assert {row["provider"] for row in found} >= providers
    optional = {"peak_mib", "forward_mib", "commit", "error", "shape", "backend", "model"}
    for row in found:
        assert all(row[field] for field in run.FIELDS if field not in optional), row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0 or row["case"] == "launch"


def test_ours_are_as_right_as_their_peers(dry):
    """In each group and dtype our error is at most twice the worst of the others, plus a rounding."""
    for name in ("kernels", "models", "models_compiled", "alignment"):
        groups = {}
        for row in rows(dry[0], name):
            groups.setdefault((row["case"], row["dtype"]), []).append(row)
        for (case, dtype), group in groups.items():
            if (name, dtype) == ("models_compiled", "float32"):  # only the base of the ratios
                assert {row["provider"] for row in group} == {"hf_eager"}
                continue
            if dtype == "float8":  # nobody else computes in it; tests/test_quantization.py holds it to its emulation
                continue
            rated = [row for row in group if row["provider"] != "conv2d"]  # which leaves out half of the work
            ours = [float(row["error"]) for row in rated if row["provider"].startswith(gpu_timing.OURS)]
            peers = [float(row["error"]) for row in rated if not row["provider"].startswith(gpu_timing.OURS)]
            allowed = 2 * max(peers) + torch.finfo(getattr(torch, dtype)).eps
            assert ours and max(ours) <= allowed, (name, case, dtype, ours, peers)


def test_every_op_and_batch_is_there(dry):
    cases = {row["case"] for row in rows(dry[0], "kernels")}
    ops = ("attention", "attention_bwd", "linear qkv", "linear out", "linear fc2", "linear_gelu", "add_layer_norm")
    ops += ("text_embed", "patch_embed", "linear_cross_entropy_bwd")
    assert cases == {f"{op} {batch}" for op in ops for batch in ("b1", "b2")}
    checked = rows(dry[0], "correctness")
    assert {row["op"] for row in checked} == {
        *("attention", "patch_embed", "text_embed", "add_layer_norm", "linear", "linear_gelu", "linear_cross_entropy"),
        *("linear_fp8", "word_patch_distance", "ipot", "sinkhorn"),
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


PARTS = """
import os, time

def good(context):
    context.emit("good", [{"pid": os.getpid()}], ("pid",))

def raises(context):
    context.note("got this far")
    raise ValueError("on purpose")

def dies(context):
    os._exit(9)

def hangs(context):
    context.emit("hangs", [{"pid": os.getpid()}], ("pid",))
    time.sleep(600)
"""


def parts(**most):
    return {
        name: gpu_campaign.Part("campaign_parts:" + name.rstrip("0123456789"), 0.1, seconds)
        for name, seconds in most.items()
    }


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    (tmp_path / "campaign_parts.py").write_text(PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_campaign, "GRACE", 0.5)
    return tmp_path / "out"


def campaign(out, chosen, minutes=5.0):
    said = []
    found = gpu_campaign.campaign(out, list(chosen), minutes, True, chosen, said.append)
    assert records(out) == found
    return {record["part"]: record for record in found}, "\n".join(said)


def test_a_part_that_fails_is_recorded_and_the_next_one_has_a_process_of_its_own(made_up):
    chosen = parts(good1=60, raises=60, good2=60, good3=60, dies=60, good4=60)
    found, said = campaign(made_up, chosen)
    assert {name: record["status"] for name, record in found.items()} == {
        "good1": "ok", "raises": "failed", "good2": "ok", "good3": "ok", "dies": "failed", "good4": "ok",
    }  # fmt: skip
    assert found["raises"]["notes"] == ["got this far", "ValueError: on purpose"]
    assert found["dies"]["notes"] == ["the process ended with status 9"]
    assert "ValueError: on purpose" in said
    assert "on purpose" in (made_up / "log.txt").read_text()
    first, second, third, fourth = (row["pid"] for row in rows(made_up, "good"))
    assert second == third and len({first, second, fourth}) == 3


def test_a_part_that_hangs_is_cut_and_what_it_wrote_stays(made_up):
    chosen = {"good": 60, "hangs": 2, "good2": 60}  # the first also waits until the process is there
    found, _ = campaign(made_up, parts(**chosen))
    assert [record["status"] for record in found.values()] == ["ok", "cut", "ok"]
    assert 2 <= found["hangs"]["seconds"] < 10
    assert len(rows(made_up, "hangs")) == 1


def test_nothing_starts_that_does_not_fit(made_up):
    chosen = {"good": gpu_campaign.Part("campaign_parts:good", 60, 90)}
    found, said = campaign(made_up, chosen, minutes=0.5)
    assert found["good"]["status"] == "skipped"
    assert "it needs 60 s" in found["good"]["notes"][0] and "it needs 60 s" in said
    assert not (made_up / "good.csv").exists()


def test_the_parts_fit_the_time_that_is_lent():
    worth = [part.least for part in gpu_campaign.PARTS.values()]
    assert sum(worth) + gpu_campaign.RESERVE < 9 * 60 < 10 * 60
    assert list(gpu_campaign.PARTS)[:3] == ["environment", "correctness", "ceilings"]


def test_exit_status_and_bad_arguments(monkeypatch, tmp_path, capsys):
    for status, wanted in {"ok": 0, "skipped": 0, "incomplete": 0, "failed": 1, "cut": 1}.items():
        monkeypatch.setattr(gpu_campaign, "campaign", lambda *_, status=status, **__: [{"status": status}])
        assert gpu_campaign.main(["--out", str(tmp_path)]) == wanted
    for argv in ([], ["--out", "x", "--minutes", "0"], ["--out", "x", "--parts", "nonsense"]):
        with pytest.raises(SystemExit):
            gpu_campaign.main(argv)
    assert "nonsense" in capsys.readouterr().err
