"""What every family of models offers: a `Swapped` for each method that it stands in for, and the options of these."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import record
from ..engine import encode as engine
from ..engine.graphs import Graphs
from ..engine.native import Runs
from ..engine.packing import Packing
from ..engine.quantization import KINDS, WeightCache
from ..ops import registry
from ..ops._check import transformed, transforming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How an accelerated model computes. A family derives its own where there is more to ask for."""

    quantize: str | None = None
    cuda_graphs: bool | str = "auto"

    def __post_init__(self):
        if self.quantize not in (None, *KINDS):
            raise ValueError(f"quantize must be None, {' or '.join(map(repr, KINDS))}, got {self.quantize!r}.")
        if not isinstance(self.cuda_graphs, bool) and self.cuda_graphs != "auto":
            raise ValueError(f"cuda_graphs must be 'auto', True or False, got {self.cuda_graphs!r}.")
        if self.quantize == "int8" and (reason := registry.why_unavailable("encoder", "cpp")):
            raise RuntimeError(f"quantize='int8' computes with the native part, and {reason}")


@dataclasses.dataclass(frozen=True)
class Features:
    """Final hidden states of texts and images, padded, and where their patches lie."""

    text: torch.Tensor  #: [B, T, D]
    image: torch.Tensor  #: [B, 1 + P, D], [CLS] first
    text_real: torch.Tensor  #: bool [B, T]
    image_real: torch.Tensor  #: bool [B, 1 + P]
    ids: torch.Tensor  #: [B, T]
    grids: Sequence[tuple[int, int]]  #: (h, w) patches of each image
    cells: Sequence[torch.Tensor]  #: of each image: y * w + x of its real patches, in order, int64
    patch_size: Sequence[int]  #: (height, width) in pixels


class Swapped:
    """A method that stands in for a module's own, as an attribute of the instance. Families derive from it.

    It belongs to one module and computes with no other's parameters. It does not keep that module alive. What copies a
    module asks the instance how: `copy.copy`, `copy.deepcopy` and `pickle` for `__reduce_ex__`, `nn.DataParallel` for
    `_replicate_for_data_parallel`. So both are put beside the method, and give each copy a swap of its own.
    """

    name: ClassVar[str] = "forward"  #: of the method
    part: ClassVar[str] = "forward"  #: what `explain` calls what it computes
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, module: nn.Module | None, options: Options):
        self._module = None if module is None else weakref.ref(module)
        self._covers = False  # whether the class's own method, bound, was on the instance before
        self._tells = True  # whether `extra_repr` is nobody else's
        self._logged = {}  # {part: what the log was told of it last}
        self.options = options

    @property
    def module(self) -> nn.Module:
        """The module whose method this is."""
        module = None if self._module is None else self._module()
        if module is None:
            raise RuntimeError(
                f"this accelerated {self.name} belongs to no module: it was copied out of one, or outlived it. "
                "Call vilt_fast.accelerate on the model that it was copied to."
            )
        return module

    @property
    def __signature__(self):
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def own(self, *args, **kwargs):
        """What the module's own method answers, as its class defines it."""
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    @property
    def __func__(self):
        """The same as a function of its module: HF Accelerate takes a method apart and binds it again."""
        return _Function(self)

    def __call__(self, *args, **kwargs):
        if record.disabled():
            return self._disabled(*args, **kwargs)
        if not record.logs():
            return self.compute(*args, **kwargs)
        with record.recorded() as recording:
            result = self.compute(*args, **kwargs)
        self._log(recording)
        return result

    def compute(self, *args, **kwargs):
        """The method itself, with its arguments."""
        raise NotImplementedError

    def _disabled(self, *args, sequence_plan=None, **kwargs):
        if not torch.compiler.is_compiling():
            record.say_disabled()
        record.say("own", record.DISABLED, (self.part, self.module))
        return self.own(*args, **kwargs)

    def _log(self, recording):
        """Tell the log what is not as it was the last time."""
        rows = recording.rows(self.module)
        changed = [row for row in rows if self._logged.get(row.part) != row]
        self._logged |= {row.part: row for row in rows}
        for row in record.in_short(changed):
            why = f", because {row.why}" if row.why else ""
            record.LOGGER.debug("%s: %s (%s): %s%s", type(self.module).__name__, row.part, row.module, row, why)

    def foretell(self) -> None:
        """Say which way a call would go, as far as that can be told by looking."""
        if record.disabled():
            record.say("own", record.DISABLED, (self.part, self.module))
        elif why := self.why_own():
            record.say("own", why, (self.part, self.module))
        else:
            self.foretell_parts()

    def why_own(self) -> str:
        """Why the module's own method has to compute every call now, or ""."""
        return ""

    def foretell_parts(self) -> None:
        """Say which way each part would go."""

    def say_own(self, why: str) -> None:
        """Say that the module's own method computes this call."""
        record.say("own", why, (self.part, self.module))

    def _extra_repr(self):
        chosen = ", ".join(
            f"{field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(self.options)
            if getattr(self.options, field.name) != field.default
        )
        mine = f"accelerated by vilt_fast{'; ' * bool(chosen)}{chosen}"
        if record.disabled():
            mine += f", but {record.DISABLED}"
        own = type(self.module).extra_repr(self.module)
        return f"{own}\n{mine}" if own else mine

    def why_transformed(self, inputs: Mapping) -> str:
        """What transforms a call with these inputs, which is for the module's own method, or "".

        Raises:
            RuntimeError: a plan was passed, which that method knows nothing of.
        """
        if not transforming():
            return ""
        tensors = [t for t in tree_leaves(dict(inputs)) if isinstance(t, torch.Tensor)]
        if not transformed([*tensors, *self.module.parameters(), *self.module.buffers()]):
            return ""
        if inputs.get("sequence_plan") is not None:
            raise RuntimeError(
                "torch.func and forward-mode AD take the model's own way, which finds its tokens itself: call it "
                "without sequence_plan."
            )
        return "torch.func or forward-mode AD transforms it"

    def plan(self, **inputs) -> Packing:
        """Where the tokens of a call with these inputs would go."""
        raise TypeError(
            f"{type(self.module).__name__} takes no sequence_plan: pass one of transformers' Vilt* models, after "
            "vilt_fast.accelerate(model)."
        )

    def refresh(self) -> None:
        """Forget what was derived from parameters."""

    def put(self) -> None:
        """Stand in for the module's own method from now on."""
        module = self.module
        if present := swap_of(module):
            present.take_out(module)
        self._covers = self.name in module.__dict__
        self._tells = "extra_repr" not in module.__dict__
        for name, value in ((self.name, self), *self._beside().items()):
            setattr(module, name, value)

    def take_out(self, module: nn.Module) -> None:
        """Leave `module` as it was; what has been wrapped around the swap since then wraps the module's own method."""
        for name, value in list(module.__dict__.items()):
            if name in self._beside() or (name == self.name and self._is_in(value) and not self._covers):
                delattr(module, name)
            elif self._is_in(value):
                setattr(module, name, getattr(type(module), self.name).__get__(module))
        if module is self.module:
            self.name, self.__class__ = self.name, _Restored

    @contextlib.contextmanager
    def out_of(self, module: nn.Module) -> Iterator[None]:
        """As `take_out`, and put in again at the end, with what is kept from call to call.

        Raises:
            TypeError: at the end, where somebody has put something in its place meanwhile.
        """
        kind, before = type(self), dict(module.__dict__)
        self.take_out(module)
        without = dict(module.__dict__)
        try:
            yield
        finally:
            if present := swap_of(module):  # accelerated in between
                present.take_out(module)
            changed = [n for n, value in before.items() if n not in without or without[n] is not value]
            for name in changed:
                if module.__dict__.get(name) is not without.get(name):
                    raise TypeError(
                        f"{type(module).__name__} was given a {name} of its own while it was restored: take it off "
                        "again before, or accelerate after, which says what it cannot stand for."
                    )
            self.__class__ = kind
            for name in changed:
                setattr(module, name, before[name])

    def _is_in(self, value) -> bool:
        function = getattr(value, "__func__", None)
        return value is self or (type(function) is _Function and function.swapped is self)

    def _beside(self) -> dict:
        copied = {"__reduce_ex__": self._reduce_module, "_replicate_for_data_parallel": self._replicate_module}
        return copied | {"extra_repr": self._extra_repr} if self._tells else copied

    def _handed_to(self, other: Swapped, attributes: dict) -> dict:
        """The attributes of a copied module, with `other` in the place of this swap."""
        other._covers, other._tells = self._covers, self._tells
        own = {name: other if self._is_in(value) else value for name, value in attributes.items()}
        return own | other._beside()

    def _reduce_module(self, protocol):
        reduced = type(self.module).__reduce_ex__(self.module, protocol)
        if isinstance(reduced, str) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        make, arguments, state, *rest = reduced
        other = type(self)(None, self.options)
        return _made_with, (other, make, arguments), self._handed_to(other, state), *rest

    def _replicate_module(self):
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        # It lives for one call, in which nothing that is captured would be replayed.
        other = type(self)(replica, dataclasses.replace(self.options, cuda_graphs=False))
        other._logged = self._logged
        replica.__dict__.update(self._handed_to(other, replica.__dict__))
        return replica

    def __getstate__(self):
        return self.__dict__ | {"_module": None, "_logged": {}}

    def __deepcopy__(self, memo):
        other = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        module = None if self._module is None else memo.get(id(self._module()))
        other._module = None if module is None else weakref.ref(module)
        return other


class _Function:
    """A swap as a function of the module, which takes another module's own way."""

    def __init__(self, swapped: Swapped):
        self.swapped = swapped

    def __call__(self, module, *args, **kwargs):
        swapped = self.swapped
        if swapped._module is not None and swapped._module() is module:
            return swapped(*args, **kwargs)
        return getattr(type(module), swapped.name)(module, *args, **kwargs)


class _Restored(Swapped):
    """A swap that was taken out while somebody held it."""

    def compute(self, *args, **kwargs):
        return self.own(*args, **kwargs)


def _made_with(swapped, make, arguments):
    """A copy of a module, which `swapped` will be put in."""
    module = make(*arguments)
    swapped._module = weakref.ref(module)
    return module


def swap_of(module: nn.Module) -> Swapped | None:
    """The swap that `module` has, whatever is wrapped around it."""
    found = getattr(module.__dict__.get("_replicate_for_data_parallel"), "__self__", None)
    return found if isinstance(found, Swapped) else None


def wrapper_of(module: nn.Module, name: str):
    """What somebody else has put on the instance in place of method `name`, or around a swap; None for nothing."""
    present, swapped = module.__dict__.get(name), swap_of(module)
    bound = isinstance(present, types.MethodType) and present.__self__ is module
    own = bound and present.__func__ is getattr(type(module), name)  # as HF Accelerate leaves it
    return None if own or (swapped is not None and swapped._is_in(present)) else present


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model that a family knows."""

    module: nn.Module
    kind: type[Swapped]
    refusal: str = ""  #: why it has to stay as it is


class SwappedTrunk(Swapped):
    """One that runs transformer blocks, and keeps what that needs from call to call."""

    def __init__(self, module: nn.Module | None, options: Options):
        super().__init__(module, options)
        self.weights = WeightCache(options.quantize) if options.quantize else None
        self.graphs = Graphs(insists=options.cuda_graphs is True) if options.cuda_graphs else None
        self.runs = Runs()

    def encode(
        self, modules: Sequence[nn.Module], describe: Callable, rows: torch.Tensor, packing: Packing, **wanted
    ) -> engine.Encoded:
        """`engine.encode` with the copies and graphs of this model, and what was found of its blocks before."""
        self.runs.live_with(self.module)
        return engine.encode(
            modules, describe, rows, packing, weights=self.weights, graphs=self.graphs, runs=self.runs, **wanted
        )

    def foretell_blocks(self, modules: Sequence[nn.Module], describe: Callable) -> None:
        """`engine.foretell` with the copies and graphs of this model."""
        engine.foretell(modules, describe, weights=self.weights, graphs=self.graphs)

    def say_own(self, why: str) -> None:
        self.say_without("own", why, self.part, self.module)

    def say_without(self, way: str, why: str, part: str, module: nn.Module) -> None:
        """Say that `module` computes all blocks in a way of its own, and warn once of options that are lost by it."""
        record.say(way, why, (part, module))
        for asked in (self.weights, self.graphs):
            if asked is not None:
                asked.say_without(type(module).__name__, why)

    def features(self, inputs: Mapping, device: torch.device) -> Features:
        """Final hidden states of processed inputs, patches in raster order; the model itself stays as it is."""
        raise NotImplementedError

    def refresh(self) -> None:
        if self.weights is not None:
            self.weights.clear()
