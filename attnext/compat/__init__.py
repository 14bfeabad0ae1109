# SPDX-License-Identifier: Apache-2.0
"""What other libraries store, in the conventions of attnext, and back."""

from attnext.compat.bias import hat_bias, hat_table, natten_rpb, swin_bias, swin_table

__all__ = ["hat_bias", "hat_table", "natten_rpb", "swin_bias", "swin_table"]
