# SPDX-License-Identifier: Apache-2.0
"""The error a user of the demonstration can mend: told in one sentence, without a traceback."""


class DemoError(Exception):
    """Wrong input to ``python -m attnext``; its message is one sentence."""
