"""Sizes are read where the reference reads them, and what a module returns is what the rest is computed on."""

import pytest
import torch
from support.models import (
    EXTRAS,
    PATCH,
    TEXT,
    assert_close,
    assert_same_output,
    batch,
    build,
    call,
    changed,
    compare,
    pair,
    trunk_of,
)
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

import vilt_fast


def convolution(*args, **kwargs):
    torch.manual_seed(1)
    return nn.Conv2d(*args, **kwargs).double()


# --- sizes that another attribute contradicts -------------------------------------------------------------------------


def longer_text(model):
    text = trunk_of(model).embeddings.text_embeddings
    twice = torch.cat([text.position_embeddings.weight.detach(), text.position_embeddings.weight.detach().flip(0)])
    text.position_embeddings = nn.Embedding.from_pretrained(twice, freeze=False)
    text.register_buffer("position_ids", torch.arange(24)[None])


def other_positions(model):
    trunk_of(model).embeddings.text_embeddings.position_ids.copy_(torch.arange(12).flip(0))


def other_token_types(model):
    trunk_of(model).embeddings.text_embeddings.token_type_ids.fill_(1)


def no_token_types(model):
    del trunk_of(model).embeddings.text_embeddings.token_type_ids


def positions_of_each_sample(model):
    text = trunk_of(model).embeddings.text_embeddings
    text.register_buffer("position_ids", torch.stack([torch.arange(12).roll(i) for i in range(4)]))


def smaller_patches(model):
    trunk_of(model).embeddings.patch_embeddings.projection = convolution(3, 32, 8, 8)


def overlapping_patches(model):
    trunk_of(model).embeddings.patch_embeddings.projection = convolution(3, 32, 16, 8)


def padded_patches(model):
    trunk_of(model).embeddings.patch_embeddings.projection = convolution(3, 32, 16, 16, padding=8)


def weight_of_another_size(model):
    trunk_of(model).embeddings.patch_embeddings.projection.weight = convolution(3, 32, 8, 8).weight


def stale_patch_size(model):
    trunk_of(model).embeddings.patch_embeddings.patch_size = (99, 99)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.projection = convolution(3, 8, 16, 16), convolution(8, 32, 1)

    def forward(self, pixels):
        return self.projection(self.stem(pixels).relu())


def backbone(model):
    trunk_of(model).embeddings.patch_embeddings = Backbone()


def fewer_heads_by_name(model):
    for layer in trunk_of(model).encoder.layer:
        layer.attention.attention.num_attention_heads = 2


def config_of_the_embeddings(model):
    trunk_of(model).embeddings.config = type(trunk_of(model).config)(max_image_length=5, image_size=64, patch_size=16)


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
@pytest.mark.parametrize("change", [
    longer_text, other_positions, other_token_types, no_token_types, positions_of_each_sample, smaller_patches,
    overlapping_patches, padded_patches, weight_of_another_size, stale_patch_size, backbone, fewer_heads_by_name,
    config_of_the_embeddings,
])  # fmt: skip
def test_sizes_that_another_attribute_contradicts(kind, change):
    inputs = {name: value for name, value in batch(kind).items() if name != "token_type_ids"}
    compare(inputs, kind=kind, change=change)


def test_a_text_longer_than_the_configuration_says():
    draw = torch.Generator().manual_seed(0)
    text = {
        "input_ids": torch.randint(0, 50, (4, 20), generator=draw),
        "token_type_ids": torch.randint(0, 2, (4, 20), generator=draw),
    }
    compare(changed(**text, attention_mask=None), change=longer_text)
    ours = vilt_fast.accelerate(build("trunk"))
    with pytest.raises(vilt_fast.InputError, match="20 tokens and the model 12 positions"):
        ours(**changed(**text, attention_mask=None))


def test_another_number_of_channels():
    def change(model):
        patches = model.embeddings.patch_embeddings
        patches.projection, patches.num_channels = convolution(4, 32, PATCH, PATCH), 4

    pixels = torch.randn(4, 4, 48, 80, dtype=torch.float64)
    compare(changed(pixel_values=pixels), change=change)
    ours = vilt_fast.accelerate(build("trunk"))
    with pytest.raises(vilt_fast.InputError, match="channel dimension"):
        ours(**changed(pixel_values=pixels))
    ours.embeddings.patch_embeddings.num_channels = 4  # and the convolution takes 3
    with pytest.raises(RuntimeError):
        ours(**changed(pixel_values=pixels))


@pytest.mark.parametrize("shape", [(1, 37, 32), (1, 16, 32), (1, 17, 16), (2, 17, 32)])
def test_a_position_table_that_does_not_fit(shape):
    for model in pair("trunk"):
        model.embeddings.position_embeddings = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        with pytest.raises(RuntimeError):
            call(model, batch("trunk"))


def test_no_plan_ahead_of_a_backbone():
    ours = build("trunk")
    backbone(ours)
    vilt_fast.accelerate(ours)
    with pytest.raises(TypeError, match="Backbone .*no sequence_plan for it"):
        vilt_fast.sequence_plan(ours, **batch("trunk"))


# --- what a module returns --------------------------------------------------------------------------------------------


def returned(model, edit):
    """`edit(tokens, mask)` of what the embedding module returns, by a hook."""
    trunk_of(model).embeddings.register_forward_hook(lambda module, args, output: edit(*output))


def without_image(tokens, mask):
    mask = mask.clone()
    mask[0, TEXT:] = 0
    return tokens, mask


def without_text(tokens, mask):
    mask = mask.clone()
    mask[3, :TEXT] = 0
    return tokens, mask


def all_real(tokens, mask):
    return tokens, torch.ones_like(mask)


def of_booleans(tokens, mask):
    return tokens, without_image(tokens, mask)[1].bool()


def prompts(tokens, mask):
    return 0.1 * torch.ones(len(tokens), 4, 32).to(tokens), torch.ones(len(mask), 4).to(mask)


def prompted_after(tokens, mask):
    more, real = prompts(tokens, mask)
    return torch.cat([tokens, more], 1), torch.cat([mask, real], 1)


def prompted_before(tokens, mask):
    more, real = prompts(tokens, mask)
    return torch.cat([more, tokens], 1), torch.cat([real, mask], 1)


def only_some(tokens, mask):
    return tokens[:, :5], torch.ones_like(mask[:, :5])


def every_other(tokens, mask):
    return tokens[:, ::2], mask[:, ::2]


EDITS = [
    without_image, without_text, all_real, of_booleans, prompted_after, prompted_before, only_some, every_other
]  # fmt: skip


def compare_returned(kind, change, inputs=None, options=None):
    """Both models, changed so that their embedding modules return something else; real is what the mask says."""
    theirs, ours = pair(kind, options=options)
    inputs = batch(kind) if inputs is None else inputs
    masks = []
    for model in (theirs, ours):
        change(model)
    trunk_of(theirs).embeddings.register_forward_hook(lambda module, args, output: masks.append(output[1] != 0))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            masks.clear()
            expected = call(theirs, inputs, **EXTRAS)
            assert_same_output(kind, call(ours, inputs, **EXTRAS), expected, masks)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "question_answering", "nlvr2"])
def test_the_returned_mask_and_width_are_honoured(kind, edit):
    compare_returned(kind, lambda model: returned(model, edit))


@pytest.mark.parametrize("edit", [prompted_after, prompted_before])
def test_prompts_without_any_padding(edit):
    inputs = batch("trunk")
    inputs |= {name: torch.ones_like(inputs[name]) for name in ("attention_mask", "pixel_mask")}
    compare_returned("trunk", lambda model: returned(model, edit), inputs)


@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
@pytest.mark.parametrize("edit", [without_image, prompted_after])
def test_a_subclass_that_returns_something_else(kind, edit):
    class Mine(hf.ViltEmbeddings):
        def forward(self, *args, **kwargs):
            return edit(*super().forward(*args, **kwargs))

    def change(model):
        trunk_of(model).embeddings.__class__ = Mine

    compare_returned(kind, change)


def fewer_patches(own):
    def visual_embed(*args, **kwargs):
        tokens, mask, patches = own(*args, **kwargs)
        return tokens[:, ::2], mask[:, ::2], patches

    return visual_embed


def more_patches(own):
    def visual_embed(*args, **kwargs):
        tokens, mask, patches = own(*args, **kwargs)
        return torch.cat([tokens, tokens], 1), torch.cat([mask, mask], 1), patches

    return visual_embed


def no_patch_index(own):
    return lambda *args, **kwargs: (*own(*args, **kwargs)[:2], None)


@pytest.mark.parametrize("options", [None, {"patch_order": "raster"}])
@pytest.mark.parametrize("other", [fewer_patches, more_patches, no_patch_index])
def test_a_visual_embed_that_returns_something_else(other, options):
    def change(model):
        model.embeddings.visual_embed = other(model.embeddings.visual_embed)

    compare_returned("trunk", change, options=options)


def test_pixels_and_masks_that_a_hook_replaces():
    """What is checked and planned is what the module is given, not what the model was."""

    def change(model):
        def before(module, args):
            ids, text_mask, types, pixels, mask, *rest = args
            return ids, text_mask, types, pixels[..., :32], torch.ones_like(mask[..., :32]), *rest

        model.embeddings.register_forward_pre_hook(before)

    compare_returned("trunk", change, changed(pixel_mask=torch.zeros(4, 48, 80)))


class Halving(nn.Module):
    """Drops every other token, as token pruning does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, *args, **kwargs):
        output = self.inner(tokens, *args, **kwargs)
        if torch.is_tensor(output):
            return output[:, ::2]
        output[0 if isinstance(output, list) else "last_hidden_state"] = output[0][:, ::2]
        return output


class HalvingLayer(Halving):
    def forward(self, tokens, *args, **kwargs):
        return (self.inner(tokens, *args, **kwargs)[0][:, ::2],)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("place, make", [
    ("encoder.layer.1", HalvingLayer), ("encoder.layer.2", HalvingLayer), ("encoder", Halving), ("layernorm", Halving)
])  # fmt: skip
def test_a_module_that_changes_the_number_of_tokens_is_named(place, make, padded):
    ours = build("trunk")
    parent, _, name = place.rpartition(".")
    holder = ours.get_submodule(parent)
    holder._modules[name] = make(holder._modules[name])
    vilt_fast.accelerate(ours)
    inputs = batch("trunk") if padded else changed(attention_mask=None, pixel_mask=None)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=rf"{make.__name__} returned \[4, \d+, 32\]"):
            ours(**inputs)


def test_no_mask_is_no_padding():
    theirs, ours = pair("trunk")
    for model in (theirs, ours):
        returned(model, lambda tokens, mask: (tokens, None))
    assert_close(*(call(m, batch("trunk")).last_hidden_state for m in (ours, theirs)))


def test_a_mask_of_another_kind_is_named():
    ours = vilt_fast.accelerate(build("trunk"))
    returned(ours, lambda tokens, mask: (tokens, mask[:, None, None, :]))
    with pytest.raises(TypeError, match=r"ViltEmbeddings returned tokens \[4, .* with a mask \[4, 1, 1"):
        ours(**batch("trunk"))


def test_raster_order_behind_a_hook_that_changes_no_mask():
    plain, hooked = (vilt_fast.accelerate(build("trunk")) for _ in range(2))
    returned(hooked, lambda tokens, mask: (tokens * 1.0, mask.clone()))
    assert_close(*(call(m, batch("trunk")).last_hidden_state for m in (hooked, plain)))
