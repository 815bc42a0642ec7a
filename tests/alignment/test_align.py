"""align: planted words lie on their patches, in every model and batch; images, strings and bad input."""

import copy

import pytest
import torch
from support.models import GRIDS, KINDS, PATCH, build
from support.original_vilt import ViLTransformerSS
from support.planted import FIRST, PLACES, picture, plant, planted_batch, processor

import vilt_fast
from vilt_fast import InputError, align, functional
from vilt_fast.testing import assert_within_budget, random_weights


def assert_planted(found, grids=GRIDS, places=PLACES):
    assert len(found) == len(places)
    for one, own, (h, w) in zip(found, places, grids, strict=True):
        assert one.plan.shape == (len(own), h * w) and one.plan.dtype == torch.float32
        assert one.tokens == tuple(str(FIRST + p) for p in own)
        assert one.grid == (h, w) and one.image_size == (h * PATCH, w * PATCH)
        assert one.heatmaps().flatten(1).argmax(1).tolist() == own
        assert torch.equal(one.heatmaps().amax((1, 2)), torch.ones(len(own)))


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_words_lie_on_their_patches(kind, accelerated):
    model = plant(build(kind, torch.float32))
    if accelerated:
        vilt_fast.accelerate(model, patch_order="reference")
    assert_planted(align(model, planted_batch()))
    assert_planted(align(torch.nn.Sequential(model), planted_batch("left")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(dtype, monkeypatch):
    assert_planted(align(plant(build("retrieval", dtype)), planted_batch()))
    transport, seen = functional.word_patch_distance, []

    def watched(text, *args, **kwargs):
        seen.append((text.dtype, torch.is_autocast_enabled("cpu")))
        return transport(text, *args, **kwargs)

    monkeypatch.setattr(functional, "word_patch_distance", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_planted(align(plant(build("retrieval", torch.float32)), planted_batch()))
    assert seen == [(torch.float32, False)]  # as in the original; and one call for the batch


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_original(accelerated):
    model = plant(random_weights(ViLTransformerSS().eval()))
    if accelerated:
        vilt_fast.accelerate(model)
    batch = planted_batch()
    own = {"text_ids": batch["input_ids"], "text_masks": batch["attention_mask"], "image": [batch["pixel_values"]]}
    assert_planted(align(model, own))
    assert_planted(align(model, {**own, "image_0": own["image"], "image": None}))
    assert_planted(align(model, batch))
    # With a norm before the blocks the original runs its own code, and draws a random order.
    model.transformer.add_norm_before_transformer = True
    assert_planted(align(model, own))
    with pytest.raises(InputError, match="ViltProcessor.from_pretrained"):
        align(model, picture(), "who")


def test_sampled_patches():
    model = plant(build("trunk", torch.float32, max_image_length=6))
    original = plant(random_weights(ViLTransformerSS(max_image_len=6).eval()))
    for one in (model, original):
        found = align(one, planted_batch())
        assert [a.grid for a in found] == GRIDS
        for a, own in zip(found, PLACES, strict=True):
            drawn = a.plan.any(0)
            assert drawn.sum() == min(6, len(drawn))
            for heat, place in zip(a.plan, own, strict=True):
                assert not drawn[place] or heat.argmax() == place


def transport(hidden, b, *, cropped):
    """(distance [1], plan [1, words, patches]) of sample b: of its real tokens, or of all with the others masked."""
    words, (h, w) = len(PLACES[b]), GRIDS[b]
    text, image = hidden[b : b + 1].split([6, hidden.shape[1] - 6], dim=1)
    real = [torch.zeros(1, rows.shape[1], dtype=torch.bool) for rows in (text, image)]
    real[0][:, 1 : 1 + words] = real[1][:, 1 : 1 + h * w] = True
    if cropped:
        text, image, real = text[real[0]][None], image[real[1]][None], [mask[mask][None] for mask in real]
    distance, plan = functional.word_patch_distance(
        text, image, ~real[0], ~real[1], beta=0.3, iterations=40, return_plan=True, backend="reference"
    )
    return distance, plan[:, real[0][0]][:, :, real[1][0]]


def test_plan_and_distance_follow_the_definition():
    model = build("question_answering", torch.float32)
    batch = planted_batch()
    batch["pixel_values"] += torch.randn(batch["pixel_values"].shape)
    found = align(model, batch, beta=0.3, iterations=40, backend="reference")

    def hidden(dtype):
        trunk = vilt_fast.accelerate(copy.deepcopy(model).to(dtype)).vilt
        with torch.no_grad():
            return trunk(**batch | {"pixel_values": batch["pixel_values"].to(dtype)}).last_hidden_state

    plain, exact = hidden(torch.float32), hidden(torch.float64)
    for b, one in enumerate(found):
        distance, plan = transport(plain, b, cropped=False)
        exact_distance, exact_plan = transport(exact, b, cropped=True)
        assert_within_budget(one.plan[None], plan, exact_plan, what="plan")
        assert_within_budget(torch.tensor([one.distance]), distance, exact_distance, what="distance")


def test_int8_stays_int8(monkeypatch):
    model = build("trunk", torch.float32)
    plain = align(model, planted_batch(), beta=0.3, iterations=40, backend="reference")
    vilt_fast.accelerate(model, quantize="int8")
    with torch.no_grad():
        hidden = model(**planted_batch()).last_hidden_state
    monkeypatch.setattr(functional, "quantize_linear", lambda *_: pytest.fail("quantised again"))
    found = align(model, planted_batch(), beta=0.3, iterations=40, backend="reference")
    for b, (one, other) in enumerate(zip(found, plain, strict=True)):
        assert_within_budget(one.plan[None], *(transport(h, b, cropped=False)[1] for h in (hidden, hidden.double())))
        if len(PLACES[b]) > 1:  # one word goes everywhere alike
            with pytest.raises(AssertionError, match="budget"):
                assert_within_budget(
                    other.plan[None], *(transport(h, b, cropped=False)[1] for h in (hidden, hidden.double()))
                )


def test_the_model_is_left_as_it_was():
    model = build("masked_lm", torch.float32, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = align(model, planted_batch())
    model.train()
    model.vilt.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    found = align(model, planted_batch())
    with pytest.raises(InputError):
        align(model, planted_batch() | {"pixel_values": torch.zeros(1, 3, 16, 16)})
    assert [module.training for module in model.modules()] == modes
    assert all(dict(module.__dict__) == before[name] for name, module in model.named_modules())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.plan, other.plan) and not one.plan.requires_grad


# --- images and texts -------------------------------------------------------------------------------------------------


def test_photographs_and_strings(tmp_path):
    from PIL import Image

    build("trunk", torch.float32).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    model = KINDS["trunk"].from_pretrained(tmp_path)
    images, texts = [picture(), Image.fromarray(picture(100, 70, 1)).convert("L")], ["Who is this?", "Playing person"]
    found = align(model, images, texts)
    assert [one.tokens for one in found] == [("who", "is", "this", "?"), ("play", "##ing", "person")]
    assert [one.image_size for one in found] == [(40, 60), (100, 70)]
    assert [one.grid for one in found] == [(4, 6), (5, 4)]
    for one in found:
        assert (one.plan >= 0).all() and 0 < one.distance < 2
    alone = align(model, images[0], texts[0], processor=processor())
    assert torch.equal(alone.plan, align(model, images[:1], texts[:1])[0].plan)
    inputs = processor()(images=[i if i is images[0] else i.convert("RGB") for i in images], text=texts,
                         padding=True, return_tensors="pt")  # fmt: skip
    for one, other in zip(align(model, inputs, processor=processor()), found, strict=True):
        assert torch.equal(one.plan, other.plan) and one.tokens == other.tokens


def test_images_of_other_depths_align_as_they_look():
    import io

    import numpy as np
    from PIL import Image

    from vilt_fast.alignment.picture import rgb

    grey = picture()[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    file = io.BytesIO()
    deep.save(file, "png")
    expected = np.repeat(grey[..., None], 3, 2)
    whole, unit = grey.astype(np.int32), grey / np.float32(255)
    greys = [grey, grey[..., None], deep, Image.open(file), grey.astype(np.uint16) * 257, unit, unit.astype(np.float16)]
    greys += [grey.astype(float), torch.tensor(unit, requires_grad=True), torch.tensor(grey, dtype=torch.bfloat16)]
    greys += [Image.fromarray(kind) for kind in (grey, whole, whole * 257, unit, grey.astype(np.float32))]
    for given in greys:
        assert np.array_equal(np.asarray(rgb(given)), expected)
    assert np.array_equal(np.asarray(rgb(picture() / 255)), picture())
    model = plant(build("retrieval", torch.float32))
    plans = [align(model, image, "who is playing", processor=processor()).plan for image in (greys[3], rgb(grey))]
    assert torch.equal(*plans)


def test_saving_and_naming(tmp_path):
    model = plant(build("retrieval", torch.float32))
    one = align(model, picture(), "who is playing", processor=processor())
    words, (h, w) = len(one.tokens), one.grid
    assert repr(one).startswith(f"Alignment({words} tokens, {h} x {w} patches, distance {one.distance:.3f}: who is")
    assert len(repr(one)) < 120
    one.save(tmp_path / "one.png", text="who", note="note", dpi=40)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    bare = align(model, planted_batch())[0]
    with pytest.raises(ValueError, match="pass image="):
        bare.save(tmp_path / "two.png")
    bare.save(tmp_path / "two.png", image=picture(), dpi=40)
    with pytest.raises(ValueError):
        one.save(tmp_path / "three.txt")


def test_whole_words():
    model = build("trunk", torch.float32)
    texts = ["playing person plays", "who"]
    pieces = align(model, [picture(), picture()], texts, processor=processor())
    words = align(model, [picture(), picture()], texts, processor=processor(), whole_words=True)
    assert pieces[0].tokens == ("play", "##ing", "person", "play", "##s")
    assert words[0].tokens == ("playing", "person", "plays") and words[1].tokens == ("who",)
    expected = torch.stack([pieces[0].plan[:2].sum(0), pieces[0].plan[2], pieces[0].plan[3:].sum(0)])
    assert torch.equal(words[0].plan, expected) and torch.equal(words[1].plan, pieces[1].plan)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"model": torch.nn.Linear(2, 2)}, TypeError, "contains no ViLT"),
        (lambda: {"model": "vilt"}, TypeError, "torch.nn.Module"),
        (lambda: {"text": None}, TypeError, "images need texts"),
        (lambda: {"text": ["who", 3], "image": [picture()] * 2}, TypeError, "strings, got int"),
        (lambda: {"text": ["who"]}, TypeError, "list of images"),
        (lambda: {"text": ["who"], "image": [picture()] * 2}, InputError, "2 images and 1 texts"),
        (lambda: {"text": [], "image": []}, InputError, "at least one"),
        (lambda: {"image": "photo.jpg"}, TypeError, "PIL.Image.open"),
        (lambda: {"image": picture().astype("int64")}, TypeError, "int64"),
        (lambda: {"image": picture().transpose(2, 0, 1)}, TypeError, "permute"),
        (lambda: {"image": picture().astype("float32") - 1}, InputError, "from -1 to"),
        (lambda: {"image": picture() * float("nan")}, InputError, "from nan"),
        (lambda: {"image": picture() * 2.0}, InputError, "0 to 255"),
        (lambda: {"image": picture()[:0]}, InputError, "must have pixels"),
        (lambda: {"image": picture(4, 400)}, InputError, "an image of 4 x 400 pixels is too long and thin"),
        (lambda: {"text": ""}, InputError, "the text has no word"),
        (lambda: {"text": ["who", " "], "image": [picture()] * 2}, InputError, r"texts \[1\] have no word"),
        (lambda: {"text": "who " * 20}, InputError, "truncate"),
        (lambda: {"processor": None}, InputError, "was not loaded from a checkpoint"),
        (lambda: {"processor": object()}, TypeError, "image_processor and tokenizer"),
        (lambda: {"image": planted_batch()}, TypeError, "no text beside"),
        (lambda: {"image": {"input_ids": torch.ones(1, 3)}, "text": None}, InputError, "lack pixel_values"),
        (
            lambda: {"image": planted_batch() | {"input_ids": [[1, 2]]}, "text": None},
            TypeError,
            "input_ids must be a tensor",
        ),
        (
            lambda: {"image": planted_batch(), "text": None, "processor": None, "whole_words": True},
            InputError,
            "needs a processor",
        ),
        (lambda: {"beta": 0.0}, ValueError, "beta"),
        (lambda: {"beta": float("nan")}, ValueError, "beta"),
        (lambda: {"iterations": 0}, ValueError, "iterations"),
    ],
)
def test_bad_input(change, error, message):
    given = {"model": build("trunk", torch.float32), "image": picture(), "text": "who", "processor": processor()}
    with pytest.raises(error, match=message):
        align(**given | change())


def test_a_wrapped_forward_is_not_passed_by():
    model = build("trunk", torch.float32)
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(TypeError, match="remove that wrapper"):
        align(model, planted_batch())


def test_a_folder_without_a_vocabulary_says_so(tmp_path):
    build("trunk", torch.float32).save_pretrained(tmp_path)
    model = KINDS["trunk"].from_pretrained(tmp_path)
    with pytest.raises(InputError, match="Pass one, for example processor="):
        align(model, picture(), "who")


@pytest.mark.gpu
def test_on_a_gpu():
    assert_planted(align(plant(build("retrieval", torch.float32)).cuda(), planted_batch()))
    assert_planted(align(plant(random_weights(ViLTransformerSS().eval())).cuda(), planted_batch()))
