# SPDX-License-Identifier: Apache-2.0
"""``python -m attnext.gpu_check``: the CUDA kernels on the GPU of whoever runs it.

A fixed list of problems (``problems.py``) is run through the public functions and held to float64
(``checks.py``), each in a process that may crash or hang (``isolation.py``); then a few cases are
timed (``timing.py``), and all of it is written down (``report.py``).
"""
