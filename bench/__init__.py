# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of attnext against what else PyTorch users have, on one machine, in one run.

A *case* is a problem with the work it needs (``cases``); a *contender* solves it (``attnext`` and
the ``peers``); the *gate* holds every contender's result, on that very case, against float64
before any figure is taken; ``timing`` runs the contenders in turn; ``memory`` asks what one call
adds to the resident set; ``roofline`` what the machine could do. ``run`` puts it together into a
record, and the tables and plots are views of the record.

CUDA kernels have figures without a GPU: ``static`` reads them from the compiler and from ``sass``,
``occupancy`` from what an SM has, for the ``kernels`` there are; ``model`` is floors on paper.
"""
