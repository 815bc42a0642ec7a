"""Calls with what a table may ask for and no row does; where they are made is in `ops.py`, an op at a time."""

from unittest import mock

from vilt_fast import order

DEPENDENT = {"PDL": True}


def tried(op, configuration, call):
    """The call under a configuration of the op."""
    with mock.patch.dict(order.TRIED, {op: configuration}):
        call()
