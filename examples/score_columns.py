"""Score the rows of a table of texts and images, with Ray Data or with datasets.

    python examples/score_columns.py ray MODEL pairs.parquet scored.parquet
    python examples/score_columns.py datasets MODEL pairs.parquet scored.parquet

The table has a column `text` of strings and a column `image` of paths or of the bytes of files.
"""

import sys

from transformers import ViltForImageAndTextRetrieval

import vilt_fast
from vilt_fast.scoring.columns import ScoreColumns


class Load:
    """Makes the model; each process that computes calls it once."""

    def __init__(self, name):
        self.name = name

    def __call__(self):
        return vilt_fast.accelerate(ViltForImageAndTextRetrieval.from_pretrained(self.name).eval())


def with_ray(name, table, out):
    import ray

    # A model uses all cores of its machine, and reading and writing need one too: as many models as machines.
    ray.data.read_parquet(table).map_batches(
        ScoreColumns, fn_constructor_args=[Load(name)], batch_size=256, concurrency=1
    ).write_parquet(out)


def with_datasets(name, table, out):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(table), split="train")
    rows.map(ScoreColumns(Load(name)), batched=True, batch_size=256).to_parquet(out)


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    {"ray": with_ray, "datasets": with_datasets}[how](*arguments)
