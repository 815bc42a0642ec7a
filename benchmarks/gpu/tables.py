"""What a campaign found, in lines short enough to be the end of a log: from the CSVs and campaign.json alone."""

import json

from .. import table

OURS = ("ours", "triton", "cuda")  #: how names of our own providers begin


def text(results):
    """All tables, the whole models last."""
    blocks = [_checks(results)]
    for name, title in (
        ("profile", ""), ("retrieval", "pairs against each other"), ("alignment", "transport"), ("kernels", "ops"),
        ("training", "training step"), ("models_compiled", "models under torch.compile"),
        ("models_launches", "models launched otherwise"),
        ("models_winners", "models with the variants that won"), ("models", "models"),
    ):  # fmt: skip
        rows = table.read(results / f"{name}.csv")
        if rows and title:
            blocks.append(_times(title, rows))
    return "\n\n".join(block for block in blocks if block)


def _checks(results):
    lines = []
    checked = table.read(results / "correctness.csv")
    if checked:
        wrong = [row for row in checked if row["within"] != "True"]
        lines.append(f"correctness: {len(checked)} quantities, {len(wrong)} out of budget")
        lines += [
            f"  {r['op']} {r['backend']} {r['dtype']} {r['quantity']}: {r['error']} against {r['reference_error']}"
            for r in wrong[:20]
        ]
    state = json.loads((results / "campaign.json").read_text()) if (results / "campaign.json").is_file() else {}
    for record in state.get("parts", []):
        for item, found in record.get("items", {}).items():
            if found["status"] in ("failed", "cut"):
                lines.append(f"{record['part']}: {item}: {found['status']}: {' '.join(found['notes'])[:160]}")
    return "\n".join(lines[:60])


def _times(title, rows):
    """A line a case: each provider's median, fastest first, ours with their host time; and the floor."""
    lines, cases = [f"{title}: us (host us)"], {}
    for row in rows:
        cases.setdefault((row["case"], row["device"]), []).append(row)
    for (case, _), group in cases.items():
        floor = min(float(row["floor_ms"] or 0) for row in group)
        group = sorted(group, key=lambda row: float(row["p50_ms"]))
        said = []
        for row in group:
            mine = row["provider"].startswith(OURS)
            host = f" ({float(row['host_us']):.0f})" if mine and row["host_us"] else ""
            said.append(f"{'*' * mine}{row['provider']} {1e3 * float(row['p50_ms']):.4g}{host}")
        lines.append(f"  {case}, floor {1e3 * floor:.3g}: " + ", ".join(said))
    return "\n".join(lines)
