"""What a GPU would be given, as far as a minute goes; `make fake-gpu` (whole.py) goes through everything."""

from support.fake_gpu.processes import played


def test_batches_of_a_server_compile_once():
    """Of one to 32 samples and of all lengths, so with partial sums of patches and without."""
    played(dict(what="models", run="serving", dtype="bfloat16"))


def test_training_and_what_no_model_calls_launch_what_fits():
    ops = "linear", "linear_fp8", "linear_cross_entropy", "ipot", "sinkhorn", "word_patch_distance"
    played(
        dict(what="models", run="training", dtype="bfloat16", batches=[8]),
        *(dict(what="ops", op=op, dtypes=["float16"], first=True) for op in ops),
    )
