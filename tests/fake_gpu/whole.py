"""Everything that a GPU would be given: `make fake-gpu`, with two releases of Triton.

Not collected by itself: its name is not that of a test. What has passed before, of the same sources, is not compiled
again.
"""

import pytest
import triton
from support.fake_gpu import passed
from support.fake_gpu.processes import played


@pytest.mark.parametrize("step", passed.STEPS)
def test_all_that_a_step_launches_compiles_and_fits(step):
    """Of ops, nothing that ships is left uncompiled; batches of a server compile once."""
    before = passed.sources(step)
    if passed.table().get((step, triton.__version__)) == before:
        return
    found = played(passed.STEPS[step])
    assert found["triton"] == triton.__version__
    passed.note(step, triton.__version__, before)  # what lay there when it began
