"""A plugin of pytest for HuggingFace's own tests: every ViLT model is accelerated as soon as it is made.

    make hf-suite HF=/path/to/transformers       # a checkout of the version that is installed, with what its tests need

What fails there and passes without `-p accelerated` is a fault of ours. The report ends with how many calls were
computed packed, lest none be.
"""

import functools

from transformers import PreTrainedModel
from transformers.models.vilt import modeling_vilt

import vilt_fast
from vilt_fast.models.vilt.trunk import TrunkForward

packed = []


def _accelerating(kind):
    init = kind.__init__

    @functools.wraps(init)
    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is kind:
            vilt_fast.accelerate(self, patch_order="reference")

    return made


def pytest_configure(config):
    for kind in vars(modeling_vilt).values():
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.__module__ == modeling_vilt.__name__:
            if kind is not modeling_vilt.ViltPreTrainedModel:
                kind.__init__ = _accelerating(kind)
    run = TrunkForward.run

    def counted(self, *args, **kwargs):
        packed.append(type(self.module))
        return run(self, *args, **kwargs)

    TrunkForward.run = counted


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(packed)} calls of accelerated models were computed packed")
