"""Bad input: a clear error, of a type that whoever caught the reference's own error still catches."""

import copy

import numpy as np
import pytest
import torch
from support.models import PATCH, TEXT, batch, build, call, leaves, pair, rectangles
from torch import nn

import vilt_fast
from vilt_fast import InputError
from vilt_fast.ops._check import readable


def without(*names):
    return dict.fromkeys(names)


def holes():
    mask = rectangles([(3, 5)] * 4)
    mask[1, 16:32, 16:32] = 0
    return mask


def off_corner():
    mask = torch.zeros(4, 48, 80)
    mask[:, 16:, 16:] = 1
    return mask


def one_empty():
    mask = rectangles([(3, 5)] * 4)
    mask[2] = 0
    return mask


def filled(value):
    return torch.full((4, 48, 80), value)


def ids(value, at=(1, 2)):
    result = torch.ones(4, TEXT, dtype=torch.long)
    result[at] = value
    return result


IMAGE = torch.zeros(4, 8, 32, dtype=torch.float64)
KEEP = torch.ones(4, 8, dtype=torch.long)

#: what changes in a good batch, and a part of the message
CASES = {
    "both texts": ({"inputs_embeds": torch.zeros(4, TEXT, 32).double()}, "both input_ids and inputs_embeds"),
    "no text": (without("input_ids"), "either input_ids or inputs_embeds"),
    "both images": ({"image_embeds": IMAGE}, "both pixel_values and image_embeds"),
    "no image": (without("pixel_values"), "either pixel_values or image_embeds"),
    "fewer images": ({"pixel_values": torch.zeros(3, 3, 48, 80)}, "same batch size.*4 texts and 3 images"),
    "fewer texts": (
        {"input_ids": torch.zeros(3, TEXT).long(), **without("attention_mask", "token_type_ids")},
        "same batch size.*3 texts and 4 images",
    ),
    "fewer text masks": ({"attention_mask": torch.ones(3, TEXT)}, r"attention_mask must be \[4, 9\].*\[3, 9\]"),
    "short text mask": ({"attention_mask": torch.ones(4, 8)}, r"attention_mask must be \[4, 9\].*\[4, 8\]"),
    "text mask of one dimension": ({"attention_mask": torch.ones(TEXT)}, "attention_mask"),
    "attention mask of three dimensions": ({"attention_mask": torch.ones(4, TEXT, TEXT)}, "attention_mask"),
    "short token types": ({"token_type_ids": torch.zeros(4, 8).long()}, "token_type_ids"),
    "fewer token types": ({"token_type_ids": torch.zeros(3, TEXT).long()}, "token_type_ids"),
    "token types out of range": ({"token_type_ids": ids(2)}, r"token_type_ids must be in \[0, 2\)"),
    "text too long": (
        {"input_ids": torch.ones(4, 13).long(), **without("attention_mask", "token_type_ids")},
        "13 tokens",
    ),
    "id too large": ({"input_ids": ids(50)}, r"input_ids must be in \[0, 50\).*50"),
    "id negative": ({"input_ids": ids(-1)}, r"input_ids must be in \[0, 50\).*-1"),
    "id out of range in padding": ({"input_ids": ids(50, (1, 8))}, "input_ids must be in"),
    "ids of floats": ({"input_ids": torch.zeros(4, TEXT)}, "int32 or int64"),
    "ids of one dimension": ({"input_ids": torch.zeros(TEXT).long()}, r"\[B, T\]"),
    "text embeddings of another width": (
        without("input_ids") | {"inputs_embeds": torch.zeros(4, TEXT, 31).double()},
        r"inputs_embeds must be \[B, T, 32\]",
    ),
    "wrong channels": ({"pixel_values": torch.zeros(4, 1, 48, 80)}, "channel dimension"),
    "pixels without a batch": (
        {
            "pixel_values": torch.zeros(3, 48, 80),
            "input_ids": torch.ones(3, TEXT).long(),
            **without("attention_mask", "token_type_ids"),
        },
        r"\[B, C, H, W\], got \[3, 48, 80\].*unsqueeze",
    ),
    "pixels of one image": ({"pixel_values": torch.zeros(3, 48, 80)}, "unsqueeze"),
    "no whole patch": ({"pixel_values": torch.zeros(4, 3, PATCH - 1, 80), "pixel_mask": None}, "no whole patch"),
    "an image without patches": ({"pixel_mask": one_empty()}, "sample 2 is empty"),
    "mask with a hole": ({"pixel_mask": holes()}, "sample 1 is not one rectangle"),
    "mask off the corner": ({"pixel_mask": off_corner()}, "top left corner"),
    "mask of another batch": ({"pixel_mask": torch.ones(3, 48, 80)}, r"pixel_mask must be \[4, height, width\]"),
    "mask of one sample": ({"pixel_mask": torch.ones(1, 48, 80)}, "pixel_mask"),
    "mask with channels": ({"pixel_mask": torch.ones(4, 3, 48, 80)}, "pixel_mask"),
    "mask of two dimensions": ({"pixel_mask": torch.ones(48, 80)}, "pixel_mask"),
    "mask of twos": ({"pixel_mask": filled(2)}, "0 .padding. and 1 .image."),
    "mask of halves": ({"pixel_mask": filled(0.5)}, "0 .padding. and 1 .image."),
    "mask of minus ones": ({"pixel_mask": filled(-1)}, "0 .padding. and 1 .image."),
    "mask of NaN": ({"pixel_mask": filled(float("nan"))}, "0 .padding. and 1 .image."),
    "mask of bytes": ({"pixel_mask": filled(3).to(torch.uint8)}, "0 .padding. and 1 .image."),
    "mask without a side": ({"pixel_mask": torch.ones(4, 0, 80)}, "length 0"),
    "empty batch": (
        {
            "input_ids": torch.zeros(0, TEXT).long(),
            "pixel_values": torch.zeros(0, 3, 48, 80),
            **without("attention_mask", "token_type_ids", "pixel_mask"),
        },
        "batch is empty",
    ),
    "image embeddings without a mask": (
        without("pixel_values", "pixel_mask") | {"image_embeds": IMAGE},
        "need a pixel_mask",
    ),
    "image embeddings with another mask": (
        without("pixel_values") | {"image_embeds": IMAGE, "pixel_mask": KEEP[:, :7]},
        "need a pixel_mask",
    ),
    "image embeddings of another width": (
        without("pixel_values") | {"image_embeds": IMAGE[..., :31], "pixel_mask": KEEP},
        r"image_embeds must be \[B, P, 32\]",
    ),
    "image embeddings of another batch": (
        without("pixel_values") | {"image_embeds": IMAGE[:3], "pixel_mask": KEEP[:3]},
        "same batch size",
    ),
    "nothing real at all": (
        without("pixel_values")
        | {"image_embeds": IMAGE, "pixel_mask": KEEP * 0, "attention_mask": torch.zeros(4, TEXT)},
        "neither a real text token nor a real image token",
    ),
    "modality out of range": ({"image_token_type_idx": 2}, r"image_token_type_idx must be in \[0, 2\)"),
    "modality negative": ({"image_token_type_idx": -1}, r"image_token_type_idx must be in \[0, 2\)"),
}
#: what the reference does not refuse, but computes garbage from
GARBAGE = {
    "mask with a hole",
    "mask of another batch",
    "mask of one sample",
    "mask of twos",
    "mask of halves",
    "mask of minus ones",
    "mask of bytes",
    "mask of NaN",
    "mask off the corner",
    "text embeddings of another width",
    "nothing real at all",
    "modality negative",
    "mask with channels",
    "an image without patches",
    "token types out of range",
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(name, hooked):
    change, message = CASES[name]
    theirs, ours = pair("trunk")
    if hooked:  # the embedding module itself is called then
        ours.embeddings.register_forward_hook(lambda *_: None)
    inputs = {k: v for k, v in (batch("trunk") | change).items() if v is not None}
    before = copy.deepcopy(inputs)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        ours(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0, equal_nan=True)
    try:
        call(theirs, inputs)
    except Exception as error:
        assert issubclass(InputError, type(error)), f"whoever catches {type(error).__name__} would miss ours"
    else:
        assert name in GARBAGE
    good = call(ours, batch("trunk"))  # and nothing is left behind
    assert torch.equal(good.pooler_output, call(ours, batch("trunk")).pooler_output)


@pytest.mark.parametrize("kind", ["masked_lm", "token_classification", "question_answering", "retrieval", "nlvr2"])
@pytest.mark.parametrize("name", ["no text", "fewer texts", "id too large", "short text mask"])
def test_bad_text_is_refused_by_every_task(kind, name):
    change, message = CASES[name]
    _, ours = pair(kind)
    inputs = {k: v for k, v in (batch(kind) | change).items() if v is not None}
    with pytest.raises(InputError, match=message):
        ours(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(4, 3, 3, 48, 80)}, "takes 2, got 3"),
        ({"pixel_values": torch.zeros(4, 3, 48, 80)}, "takes 2, got 1"),
        ({"pixel_values": None}, "takes 2, got None"),
        ({"pixel_values": torch.zeros(3, 48, 80)}, r"pixel_values must be \[B, 2, C, H, W\], got \[3, 48, 80\]"),
        ({"pixel_mask": torch.ones(4, 48, 80)}, r"pixel_mask must be \[B, 2, height, width\]"),
        ({"pixel_mask": torch.ones(4, 1, 48, 80)}, r"pixel_mask must be \[B, 2, height, width\]"),
        ({"pixel_mask": torch.stack([rectangles([(3, 5)] * 4), one_empty()], 1)}, "sample 2 is empty"),
    ],
)
def test_bad_images_are_refused_by_nlvr2(change, message):
    theirs, ours = pair("nlvr2")
    inputs = {k: v for k, v in (batch("nlvr2") | change).items() if v is not None}
    with pytest.raises(InputError, match=message):
        ours(**inputs)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        theirs(**inputs)


def test_max_image_length_0_is_refused():
    theirs, ours = pair("trunk", max_image_length=0)
    with pytest.raises(InputError, match="max_image_length 0"):
        call(ours, batch("trunk"))
    with pytest.raises(RuntimeError):
        call(theirs, batch("trunk"))


def test_a_plan_for_other_inputs_is_refused():
    ours = vilt_fast.accelerate(build("trunk"))
    inputs = {k: v for k, v in batch("trunk").items() if not k.endswith("mask")}

    def plan(batch=4, text=TEXT, canvas=(3, 5)):
        size = (canvas[0] * PATCH, canvas[1] * PATCH)
        return vilt_fast.SequencePlan.from_masks(
            None,
            None,
            text_shape=(batch, text),
            pixel_shape=(batch, 3, *size),
            patch_size=(PATCH, PATCH),
            position_grid=4,
        )

    call(ours, inputs, sequence_plan=plan())
    keep = vilt_fast.SequencePlan.from_keep_mask(None, torch.ones(4, 15), text_shape=(4, TEXT))
    for wrong, what in (
        (plan(batch=3), "3 samples of 9 text tokens and 3x5 patches.*the inputs are 4 samples"),
        (plan(text=TEXT - 1), "4 samples of 8 text tokens"),
        (plan(canvas=(5, 3)), "5x3 patches of pixel_values"),
        (keep, "15 tokens of image_embeds"),
    ):
        with pytest.raises(InputError, match=f"{what}.*sequence_plan.model, ..inputs."):
            call(ours, inputs, sequence_plan=wrong)
    with pytest.raises(InputError, match="the inputs are 4 samples of 9 text tokens and 8 tokens of image_embeds"):
        call(ours, batch("trunk", image="embeds"), sequence_plan=plan())
    with pytest.raises(TypeError, match="sequence_plan is a dict"):
        call(ours, inputs, sequence_plan={})


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
@pytest.mark.parametrize("image", ["pixels", "embeds"])
def test_a_plan_for_other_masks_is_refused(kind, image):
    ours, inputs = vilt_fast.accelerate(build(kind)), batch(kind, image=image)
    plan = vilt_fast.sequence_plan(ours, **inputs)
    good = call(ours, inputs, sequence_plan=plan)
    text, pixels = inputs["attention_mask"].clone(), inputs["pixel_mask"].clone()
    text[1, 5] = 1
    last = (3, 1) if kind == "nlvr2" else (3,)  # of NLVR2 the second image
    if image == "pixels":
        pixels[last] = rectangles([(2, 3)])[0]
        what = "image 3 of 2x5 and 2x3 patches" if kind == "nlvr2" else "image 3 of 1x1 and 2x3 patches"
    else:
        pixels[last] = 1 - pixels[last]
        what = "pixel_mask of sample 3"
    for wrong, message in (({"attention_mask": text}, "attention_mask of sample 1"), ({"pixel_mask": pixels}, what)):
        with pytest.raises(InputError, match=f"made for other masks: {message}.*vilt_fast.sequence_plan"):
            call(ours, inputs | wrong, sequence_plan=plan)
    without_masks = {
        k: v for k, v in inputs.items() if k != "attention_mask" and (image == "embeds" or k != "pixel_mask")
    }
    assert torch.equal(call(ours, without_masks, sequence_plan=plan)[0], good[0])  # then it is the plan that says


def pil(*size):
    from PIL import Image

    return Image.new("RGB", size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": [[1, 2], [3, 4]]}, "input_ids must be a tensor, got list of 2 list.*processor"),
        ({"input_ids": ["a cat", "a dog"]}, "got list of 2 str.*return_tensors='pt'"),
        ({"input_ids": None, "inputs_embeds": np.zeros((4, 9, 32))}, r"inputs_embeds.*ndarray \[4, 9, 32\] of float64"),
        ({"pixel_values": pil(80, 48)}, "pixel_values must be a tensor, got Image of 80x48 pixels"),
        ({"pixel_values": [pil(80, 48)] * 4}, "got list of 4 Image"),
        ({"pixel_values": np.zeros((4, 3, 48, 80))}, r"ndarray \[4, 3, 48, 80\].*torch.as_tensor"),
        ({"attention_mask": [[1] * 9] * 4}, "attention_mask must be a tensor"),
        ({"token_type_ids": np.zeros((4, 9))}, "token_type_ids must be a tensor"),
        ({"pixel_mask": np.ones((4, 48, 80))}, "pixel_mask must be a tensor"),
        ({"labels": [[0] * 9] * 4}, "labels must be a tensor"),
    ],
)
def test_what_is_no_tensor_is_called_by_its_name(wrong, message):
    theirs, ours = pair("masked_lm")
    with pytest.raises(TypeError, match=message):
        ours(**batch("masked_lm") | wrong)
    with pytest.raises((TypeError, AttributeError)):
        theirs(**batch("masked_lm") | wrong)
    if "pixel_values" in wrong:
        with pytest.raises(TypeError, match=message):
            pair("nlvr2")[1](**batch("nlvr2") | wrong)


def test_empty_text_and_fully_padded_text_give_finite_outputs():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _, ours = pair("trunk", dtype)
        for text, mask in ((0, None), (TEXT, torch.zeros(4, TEXT)), (TEXT, torch.zeros(4, TEXT, dtype=torch.bool))):
            inputs = {
                "input_ids": torch.ones(4, text, dtype=torch.long),
                "attention_mask": mask,
                "pixel_values": batch("trunk", dtype)["pixel_values"],
            }
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    out = call(ours, inputs, output_hidden_states=True, output_attentions=True)
                assert all(t.isfinite().all() for _, t in leaves(out))
                assert not out.last_hidden_state[:, :text].any() and out.last_hidden_state[:, text:].any()


def test_models_that_are_no_vilt_are_refused():
    for wrong in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Module()):
        before = dict(wrong.__dict__)
        with pytest.raises(TypeError, match="no ViLT"):
            vilt_fast.accelerate(wrong)
        assert wrong.__dict__ == before
        assert vilt_fast.restore(wrong) is wrong and vilt_fast.refresh(wrong) is wrong
    for wrong, message in (
        ("some/name", r"'some/name'.*from_pretrained\('some/name'\)"),
        (type(build("trunk")), "instance"),
    ):
        with pytest.raises(TypeError, match=f"takes a torch.nn.Module, got .*{message}"):
            vilt_fast.accelerate(wrong)
    for wrong in (None, "dandelin/vilt-b32-mlm", build):
        for function in (vilt_fast.accelerate, vilt_fast.restore, vilt_fast.refresh):
            with pytest.raises(TypeError, match="torch.nn.Module"):
                function(wrong)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"quantize": "int4"}, ValueError),
        ({"quantize": True}, ValueError),
        ({"patch_order": "random"}, ValueError),
        ({"generator": 3}, TypeError),
        ({"generator": torch.Generator(), "patch_order": "reference"}, ValueError),
        ({"cuda_graphs": 1}, ValueError),
        ({"nonsense": 1}, TypeError),
    ],
)
def test_invalid_options_change_nothing(options, kind):
    plain, accelerated = build("trunk"), vilt_fast.accelerate(build("trunk"))
    swap = accelerated.forward
    for model in (plain, accelerated):
        with pytest.raises(kind):
            vilt_fast.accelerate(model, **options)
    assert "forward" not in plain.__dict__ and accelerated.forward is swap


def test_a_forward_that_somebody_else_has_wrapped_is_not_overwritten():
    model = build("masked_lm")

    def wrapper(*args, **kwargs):
        return None

    model.vilt.forward = wrapper
    with pytest.raises(TypeError, match="forward of its own"):
        vilt_fast.accelerate(model)
    assert model.vilt.__dict__["forward"] is wrapper and "forward" not in model.__dict__
    assert vilt_fast.restore(model).vilt.__dict__["forward"] is wrapper


# --- values on a device -----------------------------------------------------------------------------------------------


def test_values_are_looked_at_where_that_waits_for_nothing(monkeypatch):
    here, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    monkeypatch.delenv("VILT_FAST_CHECK", raising=False)
    assert readable(here) and not readable(elsewhere)
    for value, looked_at in (("0", False), ("1", True)):
        monkeypatch.setenv("VILT_FAST_CHECK", value)
        assert readable(here) and readable(elsewhere) is looked_at


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
def test_ids_out_of_range_on_a_gpu_are_found_on_request(name, monkeypatch):
    model = vilt_fast.accelerate(build("trunk", torch.float32)).cuda()
    inputs = {k: v.cuda() for k, v in batch("trunk", torch.float32).items()}
    inputs[name][1, 2] = 50
    monkeypatch.setenv("VILT_FAST_CHECK", "1")
    with pytest.raises(vilt_fast.InputError, match=f"{name} must be in"):
        model(**inputs)
