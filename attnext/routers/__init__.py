# SPDX-License-Identifier: Apache-2.0
"""Methods that choose which blocks of keys a query attends: each a router and routed attention."""
