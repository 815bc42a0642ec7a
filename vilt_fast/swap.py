"""`accelerate` and `restore`: put the packed forward in place of a model's own, on the instance, and take it out again.

A swap is an instance attribute (`forward`) on a module, with two beside it by which copies of the module get one of
their own (`models/base.py`): nothing on a class or in another library changes, parameters and `state_dict` stay what
they are, and deleting the attributes is the exact way back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from torch import nn

from . import record
from .engine.packing import Packing
from .models import find, why_nothing
from .models.base import Swapped, swap_of, wrapper_of


def accelerate(
    model: nn.Module, *, quantize: str | None = None, cuda_graphs: bool | str = "auto", **family_options
) -> nn.Module:
    """Make a ViLT model compute packed and fused, in place; parameters, `state_dict` and outputs stay what they are.

    Args:
        model: any of HuggingFace's `Vilt*` models, the original `ViLTransformerSS`, or a module that contains one.
        quantize: "int8" (on a CPU) or "fp8" (on a GPU from sm_89 on; elsewhere emulated, with no gain) computes the
            linear layers of inference with 8-bit weights (a scale a channel) and activations (a scale a token). Keeps a
            quantised copy of these weights, made again when one has changed; edits of single elements that bump no
            version counter (through `.data`, `numpy()`) need :func:`refresh`. Training is not touched. A gradient in
            evaluation mode is that of the parameters as they are.
        cuda_graphs: "auto" captures inference on a GPU once per bucket of sizes and replays it as one launch, where
            that can be done and pays; False does not; True says once where it cannot be done, a CPU for one, and
            captures whether it pays or not. Keeps memory for the captured sizes.
        family_options: what only some models know. ViLT: `patch_order="raster"` gives image tokens row by row,
            "reference" reproduces the random order that the reference draws, under the same torch seed, so that outputs
            can be compared element by element; `generator` (a `torch.Generator`) is for the patches that a positive
            `config.max_image_length` samples; `padding="zero"` leaves padded positions of per-token outputs zero,
            "reference" computes there what the reference has, for code that pools over them or labels them.

    Returns:
        The same model. Accelerating again replaces the options. With VILT_FAST_DISABLE=1 in the environment, at a call,
        accelerated models compute as their own classes define (and take a `sequence_plan` without using it).

    Raises:
        TypeError: no part of `model` is a ViLT that is known here, or it has no such option. Nothing has been changed
            then.
        ValueError: an option has no such value. Nothing has been changed then.
        RuntimeError: "int8" without the native part. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, got {_in_its_place(model)}.")
    found = find(model)
    parts = [part for part in found if not part.refusal]
    if not parts:
        raise TypeError("; ".join(part.refusal for part in found) or why_nothing(model))
    for module, name in ((part.module, part.kind.name) for part in parts):
        present = wrapper_of(module, name)
        if present is not None:
            raise TypeError(
                f"{type(module).__name__} already has a {name} of its own on the instance "
                f"({type(present).__name__}){_whose(module)}: remove that wrapper, or accelerate before it is put on."
            )
    given = dict(quantize=quantize, cuda_graphs=cuda_graphs, **family_options)
    for swapped in [part.kind(part.module, _options(part.kind, given)) for part in parts]:
        swapped.put()
    if record.disabled():
        record.say_disabled()
    return model


def _in_its_place(model) -> str:
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        return f"{name!r}: load it first, e.g. accelerate(ViltForQuestionAnswering.from_pretrained({name!r}))"
    if isinstance(model, type):
        return f"the class {model.__name__}: pass an instance, e.g. {model.__name__}.from_pretrained(...)"
    return type(model).__name__


def _whose(module) -> str:
    if "_hf_hook" in module.__dict__:
        return ", a hook of HF Accelerate (device_map, cpu_offload; accelerate.hooks.remove_hook_from_submodules)"
    if "_original_forward" in module.__dict__:
        return ", the autocast of HF Accelerate (accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
    return ""


def _options(kind, given):
    known = sorted(field.name for field in dataclasses.fields(kind.options_type))
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"accelerate has no option {unknown[0]!r} for this model; it has {', '.join(known)}.")
    return kind.options_type(**given)


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` exactly; a model that was never accelerated is returned as it is.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    for module, swapped in _swaps(model, "restore"):
        swapped.take_out(module)
    return model


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """`with restored(model):` the model is as `restore` leaves it, and accelerated again after, as it was before.

    What was kept from call to call (8-bit copies, CUDA graphs) is kept on. Within another `restored`, or for a model
    that was never accelerated, nothing changes.

    Raises:
        TypeError: `model` is no `torch.nn.Module`; or, at the end, somebody has put a method of their own in the place
            of one that was accelerated.
    """
    with contextlib.ExitStack() as stack:
        for module, swapped in _swaps(model, "restored"):
            stack.enter_context(swapped.out_of(module))
        yield model


def refresh(model: nn.Module) -> nn.Module:
    """Quantise again at the next call.

    Needed only after an edit that bumps no version counter (through `.data`, `numpy()` or another alias) of single
    elements of a weight, or of any on a GPU; whole tensors and rows are seen on a CPU. Not needed under
    VILT_FAST_CHECK=1, which looks at every bit at every call, nor for parameters born under `torch.inference_mode()`,
    of which that is always done.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    for _, swapped in _swaps(model, "refresh"):
        swapped.refresh()
    return model


def sequence_plan(model: nn.Module, **inputs) -> Packing:
    """Where the tokens of these inputs go; pass it to calls with the same masks and sizes as `sequence_plan=`.

    Making a plan is the only part of a forward that waits for the device. With one made ahead, a forward runs without
    any wait, and `torch.compile(model, fullgraph=True)`, `torch.export` and replayed CUDA graphs see all of it.

    Args:
        model: accelerated, one of HuggingFace's classes.
        inputs: keyword arguments of the model's forward that say what is real: `input_ids` or `inputs_embeds`,
            `attention_mask`, `pixel_values`, `pixel_mask`, `image_embeds`. `max_image_length` draws its patches now.

    Raises:
        TypeError: `model` is not accelerated, or takes no plan (the original `ViLTransformerSS`).
        InputError: inputs that the model cannot be computed on.
    """
    for _, swapped in _swaps(model, "sequence_plan"):
        return swapped.plan(**inputs)
    raise TypeError(
        f"{type(model).__name__} takes no sequence_plan: pass one of transformers' Vilt* models, after "
        "vilt_fast.accelerate(model)."
    )


def _swaps(model, verb) -> list[tuple[nn.Module, Swapped]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}.")
    return [(module, swapped) for module in model.modules() if (swapped := swap_of(module)) is not None]
