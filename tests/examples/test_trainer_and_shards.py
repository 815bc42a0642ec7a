"""The examples of HuggingFace's Trainer and of several processes: each masked word weighs alike, wherever it is."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.examples import EXAMPLES, example
from support.models import batch, build, labels
from transformers import Trainer, TrainerCallback, TrainingArguments

import vilt_fast


def gradients(state):
    """Of a first step of AdamW: what it keeps is a tenth of them."""
    return {name: kept["exp_avg"] for name, kept in state.items()}


def assert_equal_gradients(a, b):
    assert a.keys() == b.keys() and not any("pooler" in name for name in a)
    size = torch.stack([g.norm() for g in a.values()]).norm()
    for name in a:  # the order of sums alone differs
        assert (a[name] - b[name]).norm() <= 10 * torch.finfo(torch.float32).eps * size, name


# --- the Trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """As outside of a test: on the CPU, and without a process group of other tests."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


SMALL = ["--scenes", "40", "--batch", "4"]


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_trainer_that_was_stopped_goes_on_with_the_same_bits(tmp_path, alone, two_threads):
    main = example("trainer").main
    run = [*SMALL, "--steps", "8", "--save", "6", "--out", str(tmp_path)]  # stopped in the second epoch
    whole = main(run)
    weights = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-8")
    again = main([*run, "--resume"])
    assert again.state.global_step == 8 and losses(again) == losses(whole) and len(set(losses(whole).values())) == 8
    others = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert weights.keys() == others.keys()
    assert not [name for name, other in others.items() if not torch.equal(weights[name], other)]


def test_words_of_accumulated_batches_weigh_alike(tmp_path, alone, monkeypatch):
    """One step of four batches of 2 is one of a batch of 8: none of them has as many masked words as another."""
    module, seen = example("trainer"), []
    mlm_loss = module.objectives.mlm_loss

    def noted(model, batch, num_items):
        seen.append((int((batch["labels"] != -100).sum()), int(num_items)))
        return mlm_loss(model, batch, num_items=num_items)

    monkeypatch.setattr(module.objectives, "mlm_loss", noted)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x)
    found = []
    for size, accumulate in ((8, 1), (2, 4)):
        run = ["--scenes", "40", "--steps", "1", "--batch", str(size), "--accumulate", str(accumulate)]
        trainer = module.main([*run, "--out", str(tmp_path / str(size))])
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        state = trainer.optimizer.state
        found.append(gradients({names[parameter]: kept for parameter, kept in state.items()}))
    (whole, total), *parts = seen
    assert [items for _, items in parts] == [total] * 4 and sum(words for words, _ in parts) == total == whole
    assert len({words for words, _ in parts}) > 1
    assert_equal_gradients(*found)


class Kept(TrainerCallback):
    """The gradients of a step."""

    def on_pre_optimizer_step(self, args, state, control, model, **others):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_trainer_treats_huggingfaces_class_as_the_plain_one(tmp_path, alone):
    """Both are told how many labels accumulated batches have, and their loss does not look: the means are summed."""
    inputs = batch("masked_lm", torch.float32) | {"labels": labels("masked_lm")}
    samples = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(2)]
    assert len({int((sample["labels"] != -100).sum()) for sample in samples} - {0}) == 2
    options = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_grad_norm=0,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    plain, trainers, found = build("masked_lm", torch.float32), [], []
    for model in (plain, vilt_fast.accelerate(build("masked_lm", torch.float32))):
        kept = Kept()
        trainers.append(Trainer(model, options, train_dataset=samples, callbacks=[kept]))
        trainers[-1].train()
        found.append(kept.gradients)
    assert len({trainer.model_accepts_loss_kwargs for trainer in trainers}) == 1
    assert_equal_gradients(*found)


# --- several processes ------------------------------------------------------------------------------------------------


def test_shards_and_copies_have_the_gradients_of_one_process(tmp_path, monkeypatch):
    run = ["--scenes", "40", "--tokens", "360", "--steps", "1"]
    module, words = example("sharded"), []
    mlm_loss = module.objectives.mlm_loss

    def noted(model, batch, num_items):
        words.append(int((batch["labels"] != -100).sum()))
        return mlm_loss(model, batch, num_items=num_items)

    monkeypatch.setattr(module.objectives, "mlm_loss", noted)
    module.main([*run, "--accumulate", "2", "--out", str(tmp_path / "one")])
    assert len(words) == 2 and words[0] != words[1]

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    for name, way in (("shards", []), ("copies", ["--ddp"])):
        launch = [*command, EXAMPLES / "sharded.py", *run, "--out", tmp_path / name, *way]
        done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    one, *others = (
        torch.load(tmp_path / name / "sharded.pt", weights_only=True) for name in ("one", "shards", "copies")
    )
    for other in others:
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert_equal_gradients(*(gradients(run["optimizer"]["state"]) for run in (one, other)))
