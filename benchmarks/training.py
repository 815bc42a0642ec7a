"""A training step: masked language modelling on a mixed batch, forward and backward, HuggingFace's eager and ours.

Both in float32 or under bfloat16 autocast, without dropout and with the original's 0.1 (on hidden states; none on
probabilities). A ratio is against HuggingFace in the same dtype with the same dropout. The error is that of all
gradients together against float64, where nothing is dropped. FLOPs and bytes are three forwards of the trunk.
"""

import contextlib

import torch
from transformers import ViltConfig, ViltForMaskedLM

import vilt_fast
from vilt_fast.commands import report

from . import cases as shapes
from . import measure, providers, table

CASE = shapes.CASES["b8"]
DROPOUTS = (0.0, 0.1)
DTYPES = ("float32", "bfloat16")


def config(dropout):
    """ViLT-B/32's."""
    return ViltConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0)


def batch(of):
    """Inputs of the case, and labels on about 15 % of the real text tokens."""
    inputs = shapes.inputs(CASE, of)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(inputs["input_ids"].shape, generator=generator) < 0.15
    chosen = drawn & (inputs["attention_mask"] == 1)
    return inputs | {"labels": inputs["input_ids"].masked_fill(~chosen, -100)}


def _step(dtype, dropout, fast):
    def build(_):
        torch.manual_seed(0)
        model = ViltForMaskedLM(config(dropout)).train()
        if fast:
            vilt_fast.accelerate(model)
        inputs = batch(model.config)

        def call(_, keep=False):
            cast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
            with cast:
                loss = model(**inputs).loss
            loss.backward()
            gradient = _gathered(model) if keep else None
            model.zero_grad(set_to_none=True)
            return gradient

        return call

    return build


def steps():
    """{name: provider} of every combination; what they are called with is not looked at."""
    return {
        f"{name}_{dtype}_dropout_{dropout}": providers.Provider(
            name, dtype, not fast, 4, 2 if dtype == "bfloat16" else 4, _step(dtype, dropout, fast),
            "" if fast else "torch",
        )
        for dropout in DROPOUTS
        for dtype in DTYPES
        for name, fast in (("hf_eager", False), ("ours", True))
    }  # fmt: skip


def rows(dtypes, repeats, memory, step):
    """Rows without the machine's columns."""
    made, found = steps(), []
    for dropout in DROPOUTS:
        for dtype in (dtype for dtype in DTYPES if dtype in dtypes):
            names = {p.name: name for name, p in made.items() if name.endswith(f"_{dtype}_dropout_{dropout}")}
            calls = {}
            for who, name in names.items():
                step(f"building {name}")
                built = made[name].build(None)
                calls[who] = lambda built=built: built(None)
                calls[who]()
            backends = {who: made[name].backend or measure.backends(calls[who]) for who, name in names.items()}
            errors = _errors(made, names) if dropout == 0 else {}
            times = report.interleave(calls, repeats, step=step)
            base = report.quantiles(times["hf_eager"])[1]
            for who, name in names.items():
                provider = made[name]
                lengths, patches = shapes.work(CASE, config(dropout), provider.padded)
                traffic = shapes.traffic(lengths, config(dropout), provider.weight_bytes, provider.activation_bytes)
                row = {
                    "subject": "training",
                    "provider": who,
                    "backend": backends[who],
                    "model": "random weights",
                    "case": f"{CASE.name} dropout {dropout}",
                    "shape": CASE.shape,
                    "dtype": dtype,
                    **table.times(report.quantiles(times[who]), base),
                    "error": errors.get(who),
                    "flops": 3 * shapes.flops(lengths, patches, config(dropout)),
                    "bytes": 3 * traffic,
                }
                if memory:
                    step(f"memory of {name}")
                    peak, above = measure.memory_in_subprocess(name, [])
                    row["peak_mib"], row["forward_mib"] = (None if v is None else v / 2**20 for v in (peak, above))
                found.append(row)
    return found


def _errors(made, names):
    """Relative error of all gradients together; without dropout."""
    torch.manual_seed(0)
    exact = ViltForMaskedLM(config(0.0)).train().double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(exact.config).items()}
    exact(**inputs).loss.backward()
    truth = _gathered(exact)
    del exact
    return {
        who: report.relative_error(made[name].build(None)(None, keep=True).double(), truth)
        for who, name in names.items()
    }


def _gathered(model):
    """All gradients, end to end; of the pooler, which masked language modelling has none for, nothing."""
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
