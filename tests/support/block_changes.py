"""Changes of a `ViltLayer` that say of themselves, by their names, what they are."""

import collections

import torch
from torch import nn


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def more(module, given, output):
    return output + 0.25


def own_forward(layer):
    dense = layer.output.dense
    dense.forward = lambda x, own=dense.forward: own(x) * 2


def other_class(layer):
    layer.intermediate.dense.__class__ = Doubled


def hooks_put_in_place(layer):
    layer.attention.output.dense._forward_hooks = collections.OrderedDict({0: more})


def other_norm(layer):
    layer.layernorm_after.eps = 1.0


def other_heads(layer):
    attention = layer.attention.attention
    heads, size = attention.num_attention_heads, attention.attention_head_size
    attention.num_attention_heads, attention.attention_head_size = heads // 2, size * 2
    if hasattr(attention, "scaling"):
        attention.scaling = (size * 2) ** -0.5


def other_activation(layer):
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def other_function_within(layer):
    layer.intermediate.intermediate_act_fn.act = torch.tanh


def names_exchanged(layer):
    parts = layer.attention.attention._modules
    parts["query"], parts["value"] = parts["value"], parts["query"]


def layer_within_replaced(layer):
    layer.attention.attention.key = nn.Linear(32, 32)


def norms_exchanged(layer):
    own = layer._modules
    own["layernorm_before"].weight.data.mul_(2)
    own["layernorm_before"], own["layernorm_after"] = own["layernorm_after"], own["layernorm_before"]


def other_strides(layer):
    weight = layer.attention.attention.query.weight
    weight.data = weight.data.t()


def no_bias(layer):
    layer.output.dense.bias = None


def a_tensor_that_is_no_parameter(layer):
    dense = layer.attention.output.dense
    weight = dense.weight.detach() * 2
    del dense.weight
    dense.weight = weight


def weights_in_place(layer):
    with torch.no_grad():
        layer.output.dense.weight.mul_(2)


def weights_behind_the_back(layer):
    layer.output.dense.weight.data = layer.output.dense.weight.data * 2


def listened_to(layer):
    layer.register_forward_hook(lambda m, a, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2)


def listened_to_within(layer):
    layer.attention.attention.value.register_forward_hook(more)


def listened_to_before(layer):
    layer.intermediate.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def attribute(name, value, *path):
    def change(module):
        setattr(module.get_submodule(".".join(path)), name, value)

    change.__name__ = "_".join((name, *path))
    return change


def cast_in_place(layer):
    weight = layer.output.dense.weight
    weight.data = weight.data.bfloat16()


def moved(layer):
    layer.bfloat16()


def frozen(layer):
    layer.output.dense.weight.requires_grad_(False)


def another_parameter(layer):
    layer.output.dense.weight = nn.Parameter(layer.output.dense.weight.detach().clone())


def no_attribute(layer):
    del layer.layernorm_after.eps


def parameters_exchanged(layer):
    own = layer.output.dense._parameters
    own["weight"], own["bias"] = own.pop("bias"), own.pop("weight")


def a_parameter_under_another_name(layer):
    own = layer.output.dense._parameters
    own["offset"] = own.pop("bias")


def another_one_is_none(layer):
    own = layer.layernorm_before._parameters  # of which only "weight" was there
    own["weight"], own["bias"] = None, own["weight"]


def parameters_in_another_dictionary(layer):
    layer.output.dense._parameters = dict(layer.output.dense._parameters)


def one_more_part(layer):
    layer.output.add_module("more", nn.Identity())


def one_part_less(layer):
    del layer.output.dropout


def a_part_under_another_name(layer):
    layer.output._modules["other"] = layer.output._modules.pop("dense")


def no_module_any_more(layer):
    layer._modules["output"] = layer.intermediate


def no_tensor_any_more(layer):
    layer.output.dense._parameters["weight"] = 3


def all_attributes_in_another_dictionary(layer):
    layer.layernorm_after.__dict__ = {**layer.layernorm_after.__dict__, "eps": 2.0}


def another_table(layer):
    layer.output.table = torch.ones(2).numpy()


def a_tensor_in_a_dictionary(layer):
    layer.output.tensors["one"] = torch.ones(2)


def linear_with_two_biases(x, weight, bias):
    return torch.addmm(bias * 2, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
