# SPDX-License-Identifier: Apache-2.0
"""What ``python -m attnext`` does: window operators and a router on a photograph and a text.

``data`` makes queries, keys and values out of the two; ``jobs`` runs an operator and torch's way of
doing the same; ``checks`` holds both against float64; ``picture`` draws; ``report`` tells.
"""
