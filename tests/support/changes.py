"""Everything that a user may do to a model between two calls, in place: `CHANGES` lists them."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from support.models import trunk_of


class LoRA(nn.Module):
    """A wrapped linear, as adapter libraries make them."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        self.down = nn.Parameter(torch.linspace(-0.3, 0.3, rank * weight.shape[1]).view(rank, -1).to(weight))
        self.up = nn.Parameter(torch.linspace(-0.3, 0.3, rank * weight.shape[0]).view(-1, rank).to(weight))

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Linear):
    """A linear that is not quite one."""

    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 1.3


def linears(model):
    """(holder, name) of every linear in the blocks."""
    encoder = trunk_of(model).encoder
    return [
        (encoder.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
        for path, m in list(encoder.named_modules())
        if isinstance(m, nn.Linear)
    ]


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (1 + i % 3))
    optimizer.step()
    optimizer.zero_grad()


def in_place(model):
    with torch.no_grad():
        for parameter in trunk_of(model).encoder.parameters():
            parameter.add_(0.1)


def data_whole(model):
    for parameter in trunk_of(model).encoder.parameters():
        parameter.data.mul_(1.25)


def data_row(model):
    for holder, name in linears(model):
        getattr(holder, name).weight.data[5] += 0.5


def data_assigned(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def new_parameters(model):
    for holder, name in linears(model):
        linear = getattr(holder, name)
        linear.weight = nn.Parameter(linear.weight.detach() * 0.7)


def state_loaded(model):
    model.load_state_dict({k: v * 1.2 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def state_assigned(model):
    model.load_state_dict({k: v * 1.2 for k, v in model.state_dict().items()}, assign=True)


def replaced_layer(model):
    layers = trunk_of(model).encoder.layer
    layers[1] = copy.deepcopy(layers[0])


def fewer_layers(model):
    trunk_of(model).encoder.layer = trunk_of(model).encoder.layer[:2]


def replaced_linear(model):
    for holder, name in linears(model):
        old = getattr(holder, name)
        new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
        new.weight.data.copy_(old.weight.data.flip(0))
        setattr(holder, name, new)


def replaced_embedding(model):
    old = model.get_input_embeddings()
    new = nn.Embedding(*old.weight.shape, dtype=old.weight.dtype)
    new.weight.data.copy_(old.weight.data.flip(0))
    model.set_input_embeddings(new)


def other_norm_eps(model):
    for layer in trunk_of(model).encoder.layer:
        layer.layernorm_before.eps = 0.5


def wrapped(model):
    for holder, name in linears(model):
        setattr(holder, name, LoRA(getattr(holder, name)))


def wrapped_twice(model):
    wrapped(model)
    wrapped(model)  # the base layers of the first wrapping


def wrapped_one(model):
    output = trunk_of(model).encoder.layer[1].output
    output.dense = LoRA(output.dense)


def subclassed(model):
    for holder, name in linears(model):
        old = getattr(holder, name)
        new = Doubled(old.in_features, old.out_features, dtype=old.weight.dtype)
        new.load_state_dict(old.state_dict())
        setattr(holder, name, new)


def parametrized(model):
    for holder, name in linears(model):
        parametrize.register_parametrization(getattr(holder, name), "weight", Scaled())


def moved_to_bfloat16(model):
    model.bfloat16()


def moved_there_and_back(model):
    model.bfloat16().float()


def moved_to_float64(model):
    model.double()


def one_layer_moved(model):
    trunk_of(model).encoder.layer[1].register_forward_pre_hook(lambda m, a: (a[0].double(), *a[1:]))
    trunk_of(model).encoder.layer[1].register_forward_hook(lambda m, a, out: (out[0].float(), *out[1:]))
    trunk_of(model).encoder.layer[1].double()


CHANGES = [
    optimizer_step,
    in_place,
    data_whole,
    data_row,
    data_assigned,
    new_parameters,
    state_loaded,
    state_assigned,
    replaced_layer,
    fewer_layers,
    replaced_linear,
    replaced_embedding,
    other_norm_eps,
    wrapped,
    wrapped_twice,
    wrapped_one,
    subclassed,
    parametrized,
    moved_to_bfloat16,
    moved_there_and_back,
    moved_to_float64,
    one_layer_moved,
]
