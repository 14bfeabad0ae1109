# SPDX-License-Identifier: Apache-2.0
"""Wrong calls: each is refused with the right exception, which names the argument and the rule."""

import sys

import pytest
import torch

from attnext import (
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    sliding_window_attention,
    window_attention,
)
from attnext.compat.bias import natten_rpb, swin_bias


def x(*shape, **options):
    return torch.zeros(shape, **options)


LINE = (1, 6, 2, 4)
PLANE = (1, 5, 6, 2, 4)


def line(function, *args, q=None, k=None, v=None, **options):
    return function(*(x(*LINE) if t is None else t for t in (q, k, v)), *args, **options)


def plane(function, *args, q=None, k=None, v=None, **options):
    return function(*(x(*PLANE) if t is None else t for t in (q, k, v)), *args, **options)


def na(*args, **options):
    return plane(neighborhood_attention, *args, **options)


def swa(*args, **options):
    return line(sliding_window_attention, *args, **options)


def wa(*args, **options):
    return plane(window_attention, *args, **options)


def cu(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, dtype=dtype)


# A call, the exception, a fragment of its message.
WRONG = {
    # query, key, value
    "query no tensor": (lambda: swa(2, q=[1.0]), TypeError, "query must be a tensor, got list"),
    "key no tensor": (lambda: swa(2, k=3), TypeError, "key must be a tensor, got int"),
    "value no tensor": (lambda: swa(2, v="v"), TypeError, "value must be a tensor, got str"),
    "integers": (lambda: swa(2, q=x(*LINE, dtype=torch.int64)), TypeError, "query must be .*int64"),
    "complex": (
        lambda: swa(2, q=x(*LINE, dtype=torch.complex64)),
        TypeError,
        "query must be .*complex64",
    ),
    "float8": (
        lambda: swa(2, q=x(*LINE).to(torch.float8_e5m2)),
        TypeError,
        "query must be .*float8",
    ),
    "key dtype": (lambda: swa(2, k=x(*LINE).half()), TypeError, "key must .*float32.*float16"),
    "value dtype": (
        lambda: swa(2, v=x(*LINE).double()),
        TypeError,
        "value must .*float32.*float64",
    ),
    "key on another device": (
        lambda: swa(2, k=x(*LINE, device="meta")),
        ValueError,
        "key must be on .*cpu.*meta",
    ),
    "value on another device": (
        lambda: swa(2, v=x(*LINE, device="meta")),
        ValueError,
        "value must be on .*cpu.*meta",
    ),
    "no token axis": (
        lambda: neighborhood_attention(x(1, 2, 4), x(1, 2, 4), x(1, 2, 4), 3),
        ValueError,
        r"query must .* 1 to 3 token axes.*\(1, 2, 4\)",
    ),
    "four token axes": (
        lambda: neighborhood_attention(*[x(1, 2, 2, 2, 2, 2, 4)] * 3, 3),
        ValueError,
        "query must .* 1 to 3 token axes",
    ),
    "key rank": (lambda: swa(2, k=x(*PLANE)), ValueError, "key must have .*dimensions.*4.*5"),
    "value rank": (lambda: na(3, v=x(*LINE)), ValueError, "value must have .*dimensions.*5.*4"),
    "key batch": (lambda: swa(2, k=x(2, 6, 2, 4)), ValueError, "key must have the batch.* 1.* 2"),
    "value batch": (lambda: swa(2, v=x(3, 6, 2, 4)), ValueError, "value must have .* 1.* 3"),
    "value tokens": (
        lambda: swa(2, v=x(1, 5, 2, 4)),
        ValueError,
        r"value must .*\(6, 2\).*\(5, 2\)",
    ),
    "value heads": (
        lambda: swa(2, v=x(1, 6, 1, 4)),
        ValueError,
        r"value must .*\(6, 2\).*\(6, 1\)",
    ),
    "key head_dim": (
        lambda: swa(2, k=x(1, 6, 2, 5)),
        ValueError,
        "key must have the head_dim of query, 4, got 5",
    ),
    "head_dim zero": (lambda: swa(2, q=x(1, 6, 2, 0), k=x(1, 6, 2, 0)), ValueError, "head_dim"),
    "value head_dim zero": (lambda: swa(2, v=x(1, 6, 2, 0)), ValueError, "head_dim"),
    "heads not a multiple": (
        lambda: swa(2, q=x(1, 6, 3, 4)),
        ValueError,
        "multiple of the heads of key, got 3 and 2",
    ),
    "fewer query heads": (
        lambda: swa(2, q=x(1, 6, 1, 4)),
        ValueError,
        "multiple of the heads of key, got 1 and 2",
    ),
    "no heads": (
        lambda: swa(2, q=x(1, 6, 0, 4), k=x(1, 6, 0, 4), v=x(1, 6, 0, 4)),
        ValueError,
        "heads",
    ),
    "sequence of rank 2": (
        lambda: plane(sliding_window_attention, 3),
        ValueError,
        r"query must be \[B, N, H, D\]",
    ),
    "na1d of a plane": (
        lambda: plane(na1d, 3),
        ValueError,
        "query must have 4 dimensions for na1d",
    ),
    "a list of axes or of heads": (
        lambda: na2d(*[x(1, 6, 5, 2, 4)] * 3, [3, 5]), ValueError,
        "kernel_size is a list with an entry for each of 2 heads and as many axes",
    ),
    "sides of another number of axes": (
        lambda: plane(na2d, (1, 2, 3)), ValueError, r"an int or \(left, right\) per token axis, 2",
    ),
    "boundary no name": (
        lambda: plane(neighborhood_attention, 3, boundary=torch.ones(2)), ValueError,
        "boundary must be one of",
    ),
    "na2d of a line": (lambda: line(na2d, 3), ValueError, "query must have 5 dimensions for na2d"),
    "na3d of a plane": (
        lambda: plane(na3d, 3),
        ValueError,
        "query must have 6 dimensions for na3d",
    ),
    "window tokens differ": (
        lambda: wa(3, k=x(1, 5, 7, 2, 4), v=x(1, 5, 7, 2, 4)),
        ValueError,
        "key must have the token",
    ),
    # kernel_size, stride, dilation, is_causal, boundary, phase, offset
    "kernel_size zero": (lambda: na(0), ValueError, "kernel_size must be at least 1, got 0"),
    "kernel_size negative": (lambda: na((3, -2)), ValueError, "kernel_size must be .*, got -2"),
    "kernel_size float": (lambda: na(3.0), TypeError, "kernel_size must be .*got 3.0"),
    "kernel_size bool": (lambda: na(True), TypeError, "kernel_size must be .*got True"),
    "kernel_size entries": (lambda: na((3, 3, 3)), ValueError, r"kernel_size .*2, got \(3, 3, 3\)"),
    "kernel_size string": (lambda: na(("3", 3)), TypeError, "kernel_size must be an int, got '3'"),
    "kernel_size of three sides": (
        lambda: na(((1, 1, 1), 3)),
        ValueError,
        r"kernel_size .*\(left, right\).*\(1, 1, 1\)",
    ),
    "kernel_size beside self": (
        lambda: na(((-2, 1), 3)),
        ValueError,
        "kernel_size must be .*got -2",
    ),
    "kernel_size right of causal": (
        lambda: na(((2, 1), 3), is_causal=True),
        ValueError,
        r"kernel_size.*causal.*\(2, 1\)",
    ),
    "kernel_size per head": (lambda: na([3, 3, 3]), ValueError, "kernel_size as a list .*2, got 3"),
    "stride zero": (lambda: na(3, 0), ValueError, "stride must be at least 1, got 0"),
    "stride float": (lambda: na(3, (1, 1.5)), TypeError, "stride must be an int, got 1.5"),
    "stride entries": (lambda: na(3, (1,)), ValueError, r"stride must .*2, got \(1,\)"),
    "stride larger than kernel": (
        lambda: na(3, 4),
        ValueError,
        "stride must not exceed kernel_size, got 4 > 3",
    ),
    "dilation zero": (lambda: na(3, 1, 0), ValueError, "dilation must be at least 1, got 0"),
    "dilation none": (lambda: na(3, 1, None), TypeError, "dilation must be .*got None"),
    "dilation entries": (lambda: na(3, 1, (1, 2, 3)), ValueError, "dilation must have one entry"),
    "is_causal int": (lambda: na(3, 1, 1, 1), TypeError, "is_causal must be .*got 1"),
    "is_causal entries": (
        lambda: na(3, 1, 1, (True,)),
        ValueError,
        r"is_causal must .*2, got \(True,\)",
    ),
    "is_causal mixed": (lambda: na(3, 1, 1, (True, 0)), TypeError, "is_causal must be .*bool"),
    "boundary": (lambda: na(3, boundary="wrap"), ValueError, "boundary must be one of .*'wrap'"),
    "boundary none": (lambda: na(3, boundary=None), ValueError, "boundary must be one of .*None"),
    "phase float": (lambda: na(3, phase=0.5), TypeError, "phase must be .*got 0.5"),
    "phase entries": (lambda: na(3, phase=(0, 0, 0)), ValueError, "phase must have one entry"),
    "offset string": (lambda: na(3, offset="left"), TypeError, "offset must be .*got 'left'"),
    "offset entries": (lambda: na(3, offset=(1,)), ValueError, "offset must have one entry"),
    # window_size and shift
    "window_size zero": (lambda: swa(0), ValueError, "window_size must be at least 1, got 0"),
    "window_size float": (lambda: swa(2.5), TypeError, "window_size must be an int, got 2.5"),
    "window_size side": (
        lambda: swa((-2, 0)),
        ValueError,
        "window_size must be at least -1, got -2",
    ),
    "window_size one side": (
        lambda: swa((3,)),
        ValueError,
        r"window_size must be .*\(left, right\), got \(3,\)",
    ),
    "window_size right of causal": (
        lambda: swa((3, 1)),
        ValueError,
        r"window_size: right must be 0 or -1 when causal",
    ),
    "window_size per head": (
        lambda: swa([2, 3, 4]),
        ValueError,
        "window_size as a list .*2, got 3",
    ),
    "sliding is_causal": (lambda: swa(2, is_causal="yes"), TypeError, "is_causal must be a bool"),
    "tile zero": (lambda: wa((3, 0)), ValueError, "window_size must be at least 1, got 0"),
    "tile none": (lambda: wa(None), TypeError, "window_size must be .*got None"),
    "tile entries": (
        lambda: wa((3, 3, 3)),
        ValueError,
        "window_size must have one entry per token",
    ),
    "shift float": (lambda: wa(3, 1.5), TypeError, "shift must be .*got 1.5"),
    "shift entries": (lambda: wa(3, (1,)), ValueError, "shift must have one entry per token axis"),
    "key_window_size": (
        lambda: wa(4, key_window_size=3),
        ValueError,
        "key_window_size must be .*window_size.* 3",
    ),
    "key_window_size entries": (
        lambda: wa(4, key_window_size=(6,)),
        ValueError,
        "key_window_size must have one entry",
    ),
    "tile boundary": (lambda: wa(3, boundary="pad"), ValueError, "boundary must be one of .*'pad'"),
    # sinks and packed sequences
    "sinks negative": (lambda: swa(2, sinks=-1), ValueError, "sinks must be at least 0, got -1"),
    "sinks float": (lambda: swa(2, sinks=1.0), TypeError, "sinks must be an int, got 1.0"),
    "cu_seqlens_k alone": (
        lambda: swa(2, cu_seqlens_k=cu(0, 6)),
        ValueError,
        "cu_seqlens_k needs cu_seqlens_q",
    ),
    "cu_seqlens list": (
        lambda: swa(2, cu_seqlens_q=[0, 6]),
        TypeError,
        "cu_seqlens_q must be an int32 tensor",
    ),
    "cu_seqlens int64": (
        lambda: swa(2, cu_seqlens_q=cu(0, 6, dtype=torch.int64)),
        TypeError,
        "cu_seqlens_q .*int64",
    ),
    "cu_seqlens rank": (
        lambda: swa(2, cu_seqlens_q=cu(0, 6)[None]),
        ValueError,
        r"cu_seqlens_q must be \[N \+ 1\]",
    ),
    "cu_seqlens too short": (
        lambda: swa(2, cu_seqlens_q=cu(0)),
        ValueError,
        "cu_seqlens_q must be",
    ),
    "cu_seqlens start": (
        lambda: swa(2, cu_seqlens_q=cu(1, 6)),
        ValueError,
        r"cu_seqlens_q must rise from 0 .*\[1, 6\]",
    ),
    "cu_seqlens end": (lambda: swa(2, cu_seqlens_q=cu(0, 5)), ValueError, "cu_seqlens_q .*6.*5"),
    "cu_seqlens descend": (
        lambda: swa(2, cu_seqlens_q=cu(0, 4, 2, 6)),
        ValueError,
        r"cu_seqlens_q must rise .*\[0, 4, 2, 6\]",
    ),
    "cu_seqlens_k end": (
        lambda: swa(2, cu_seqlens_q=cu(0, 6), cu_seqlens_k=cu(0, 7)),
        ValueError,
        "cu_seqlens_k",
    ),
    "cu_seqlens differ": (
        lambda: swa(2, cu_seqlens_q=cu(0, 6), cu_seqlens_k=cu(0, 3, 6)),
        ValueError,
        "cu_seqlens_k must list as many",
    ),
    "cu_seqlens batch": (
        lambda: swa(2, q=x(2, 6, 2, 4), k=x(2, 6, 2, 4), v=x(2, 6, 2, 4), cu_seqlens_q=cu(0, 6)),
        ValueError,
        "query must have batch size 1",
    ),
    # scale, softcap, bias, slopes, sinks, additional keys
    "scale string": (lambda: na(3, scale="auto"), TypeError, "scale must be .*got 'auto'"),
    "scale infinite": (lambda: na(3, scale=float("inf")), ValueError, "scale must be finite"),
    "scale nan": (lambda: na(3, scale=float("nan")), ValueError, "scale must be finite"),
    "scale bool": (lambda: na(3, scale=True), TypeError, "scale must be .*got True"),
    "scale shape": (lambda: na(3, scale=x(3)), ValueError, r"scale must be .*\(3,\)"),
    "scale too many axes": (
        lambda: na(3, scale=x(1, 1, 5, 6, 2)),
        ValueError,
        "scale must be .*broadcast",
    ),
    "scale of integers": (lambda: na(3, scale=x(2).long()), TypeError, "scale must be .*int64"),
    "softcap zero": (lambda: na(3, softcap=0), ValueError, "softcap must be positive.*got 0"),
    "softcap negative": (lambda: na(3, softcap=-2.0), ValueError, "softcap must be positive"),
    "softcap nan": (lambda: na(3, softcap=float("nan")), ValueError, "softcap must be positive"),
    "softcap tensor": (lambda: na(3, softcap=x(1)), TypeError, "softcap must be a number"),
    "bias rank": (lambda: na(3, bias=x(2, 5)), ValueError, r"bias must be \[heads.*\(2, 5\)"),
    "bias heads": (lambda: na(3, bias=x(1, 5, 5)), ValueError, r"bias must .*2 heads.*\(1, 5, 5\)"),
    "bias even": (lambda: na(3, bias=x(2, 4, 5)), ValueError, r"bias must have odd .*\(4, 5\)"),
    "bias too small": (lambda: na(5, bias=x(2, 9, 7)), ValueError, "bias.*axis 1.* 7 .* 9"),
    "bias too small for dilation": (lambda: swa(3, bias=x(2, 3)), ValueError, "bias.* 3 .* 5"),
    "bias too small for sinks": (
        lambda: swa(2, sinks=1, bias=x(2, 5)),
        ValueError,
        "bias.* 5 .* 11",
    ),
    "bias integers": (lambda: na(3, bias=x(2, 5, 5).int()), TypeError, "bias must be .*int32"),
    "bias no tensor": (lambda: na(3, bias=0.5), TypeError, "bias must be .*float"),
    "bias device": (lambda: na(3, bias=x(2, 5, 5, device="meta")), ValueError, "bias .*meta"),
    "alibi_slopes shape": (
        lambda: na(3, alibi_slopes=x(3)),
        ValueError,
        r"alibi_slopes must .*\(2,\).*\(3,\)",
    ),
    "alibi_slopes number": (lambda: na(3, alibi_slopes=1.0), TypeError, "alibi_slopes must be"),
    "sink_logits shape": (
        lambda: na(3, sink_logits=x(2, 1)),
        ValueError,
        r"sink_logits must .*\(2,\).*\(2, 1\)",
    ),
    "sink_logits number": (lambda: swa(3, sink_logits=0.0), TypeError, "sink_logits must be"),
    "additional_keys alone": (
        lambda: na(3, additional_keys=x(1, 2, 2, 4)),
        ValueError,
        "additional_keys and",
    ),
    "additional_values alone": (
        lambda: na(3, additional_values=x(1, 2, 2, 4)),
        ValueError,
        "additional_keys and",
    ),
    "additional_keys dtype": (
        lambda: na(3, additional_keys=x(1, 2, 2, 4).half(), additional_values=x(1, 2, 2, 4)),
        TypeError,
        "additional_keys must be .*float16",
    ),
    "additional_keys rank": (
        lambda: na(3, additional_keys=x(2, 2, 4), additional_values=x(1, 2, 2, 4)),
        ValueError,
        r"additional_keys must be .*\(2, 2, 4\)",
    ),
    "additional_keys heads": (
        lambda: na(3, additional_keys=x(1, 2, 1, 4), additional_values=x(1, 2, 2, 4)),
        ValueError,
        "additional_keys must have shape",
    ),
    "additional_values count": (
        lambda: na(3, additional_keys=x(1, 2, 2, 4), additional_values=x(1, 3, 2, 4)),
        ValueError,
        "additional_values must have shape",
    ),
    # merge_attentions
    "merge nothing": (lambda: merge_attentions([], []), ValueError, "outputs and lses .*0 and 0"),
    "merge counts": (
        lambda: merge_attentions([x(2, 3)], [x(2), x(2)]),
        ValueError,
        "outputs and lses .*1 and 2",
    ),
    "merge shapes": (
        lambda: merge_attentions([x(2, 3), x(2, 4)], [x(2), x(2)]),
        ValueError,
        r"outputs must .*\(2, 3\).*\(2, 4\)",
    ),
    "merge lse shape": (
        lambda: merge_attentions([x(2, 3)], [x(2, 3)]),
        ValueError,
        r"lses must .*\(2,\).*\(2, 3\)",
    ),
    "merge integers": (
        lambda: merge_attentions([x(2, 3).int()], [x(2)]),
        TypeError,
        "outputs must be .*int32",
    ),
    # numbers that no tensor has
    "return_lse no bool": (lambda: swa(2, return_lse="x"), TypeError, "return_lse must be a bool"),
    "kernel_size of 70 bits": (lambda: na(2**70), ValueError, "kernel_size must be between"),
    "stride of 70 bits": (lambda: na(3, 2**70), ValueError, "stride must be between"),
    "dilation of 70 bits": (lambda: na(3, 1, 2**70), ValueError, "dilation must be between"),
    "phase of 70 bits": (lambda: na(3, phase=2**70), ValueError, "phase must be between"),
    "offset of 70 bits": (lambda: na(3, offset=-(2**70)), ValueError, "offset must be between"),
    "shift of 70 bits": (lambda: wa(3, 2**70), ValueError, "shift must be between"),
    "sinks of 70 bits": (lambda: swa(2, sinks=2**70), ValueError, "sinks must be between"),
    "scale of 400 digits": (lambda: swa(2, scale=10**400), ValueError, "scale must be finite"),
    "softcap below float32": (lambda: swa(2, softcap=1e-60), ValueError, "softcap must be between"),
    "softcap at its end": (lambda: swa(2, softcap=3e38), ValueError, "softcap must be between"),
    "offset beyond phantoms": (
        lambda: na(3, offset=2**40, boundary="zero_pad"), ValueError, "offset must be between",
    ),
    "shift beyond phantoms": (
        lambda: wa(3, 2**40, boundary="zero_pad"), ValueError, "shift must be between",
    ),
    "window of phantoms": (
        lambda: wa(2**22, boundary="zero_pad"), ValueError, "window_size must not exceed",
    ),
    "ALiBi over a far offset": (
        lambda: na(3, offset=2**31, alibi_slopes=x(2)), ValueError, "alibi_slopes takes distances",
    ),
    # tensors of another kind
    "sparse": (lambda: swa(2, q=x(*LINE).to_sparse()), TypeError, "query must be a dense tensor"),
    "nested": (
        lambda: swa(2, q=torch.nested.nested_tensor([x(6, 2, 4)])), TypeError,
        "query must be a dense tensor, got a nested tensor",
    ),
    "nested key": (
        lambda: swa(2, k=torch.nested.nested_tensor([x(6, 2, 4)])), TypeError,
        "key must be a dense tensor, got a nested tensor",
    ),
    "sparse key": (lambda: swa(2, k=x(*LINE).to_sparse()), TypeError, "key must be a dense tensor"),
    "cu_seqlens elsewhere": (
        lambda: swa(2, cu_seqlens_q=cu(0, 6).to("meta")), ValueError,
        "cu_seqlens_q must be on the CPU or the device of query",
    ),
    "a window that is a dict": (lambda: na([{}, 3]), TypeError, "kernel_size: the entry of a head"),
    "merging a tensor": (
        lambda: merge_attentions(x(2, 3), [x(2)] * 2), TypeError, "outputs must be a list or tuple",
    ),
    "merging across devices": (
        lambda: merge_attentions([x(2, 3), x(2, 3, device="meta")], [x(2)] * 2), ValueError,
        "outputs must be on cpu",
    ),
    "a number for a table": (lambda: swin_bias([1], 3), TypeError, "table must be a tensor"),
    "a table's side as a float": (
        lambda: swin_bias(x(25, 2), 3.0), TypeError, "window_size must be an int",
    ),
    "a table's side in a tuple": (
        lambda: swin_bias(x(25, 2), (3, "3")), TypeError, "window_size must be an int",
    ),
    "no legacy table": (lambda: natten_rpb(None), TypeError, "rpb must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        call()


def test_equal_numbers_of_other_types():
    """What has been checked once is not taken for what only compares equal to it."""
    assert na((3, 1), is_causal=(True, False)).shape == PLANE
    with pytest.raises(TypeError, match="is_causal must be"):
        na((3, 1), is_causal=(1, 0))
    assert na((3, 3)).shape == na((1, 1)).shape == PLANE
    with pytest.raises(TypeError, match="kernel_size must be an int"):
        na((3.0, 3.0))
    with pytest.raises(TypeError, match="kernel_size must be an int"):
        na((True, True))


def test_the_largest_numbers():
    """Windows that no axis fills, and dilations that part all tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(LINE, generator=generator) for _ in range(3))
    far, whole = sys.maxsize >> 1, (-1, -1)
    dense = sliding_window_attention(q, k, v, None, is_causal=False)
    for window in ((far, far), (1 << 61, far), far):
        got = sliding_window_attention(q, k, v, window, is_causal=False)
        assert torch.equal(got, dense), window
    right = sliding_window_attention(q, k, v, (1, far), is_causal=False)
    assert torch.equal(right, sliding_window_attention(q, k, v, (1, -1), is_causal=False))
    assert torch.equal(neighborhood_attention(q, k, v, [(whole,), ((far, far),)]), dense)
    for boundary in ("inward", "truncate", "zero_pad"):
        for offset in (0, -3, 2):
            options = {"boundary": boundary, "offset": offset}
            alone = neighborhood_attention(q, k, v, 3, 1, 100, **options)
            assert torch.equal(neighborhood_attention(q, k, v, 3, 1, 1 << 60, **options), alone)


def test_the_same_calls_without_the_mistake():
    """What the table is built from is right: each error comes from the one thing that is wrong."""
    modifiers = {
        "scale": x(1, 5, 6, 2), "softcap": 2.0, "bias": x(2, 9, 9), "alibi_slopes": x(2),
        "sink_logits": x(2), "additional_keys": x(1, 3, 2, 4), "additional_values": x(1, 3, 2, 4),
    }  # fmt: skip
    assert na((3, 5), (1, 2), 1, (True, False), offset=0, phase=1, **modifiers).shape == PLANE
    assert na([3, (4, (1, 2))], boundary="truncate").shape == PLANE
    assert wa((3, 2), (1, 0), key_window_size=4).shape == PLANE
    bounds = {"cu_seqlens_q": cu(0, 4, 6), "cu_seqlens_k": cu(0, 0, 6)}
    assert swa((2, -1), sinks=2, **bounds).shape == LINE
    assert swa([None, 3], is_causal=False).shape == LINE
    assert line(na1d, 3).shape == LINE and plane(na2d, 3).shape == PLANE
    assert na3d(*[x(1, 2, 3, 2, 2, 4)] * 3, 2).shape == (1, 2, 3, 2, 2, 4)
    assert merge_attentions([x(2, 3)] * 2, [x(2)] * 2)[0].shape == (2, 3)


def fake_line(device, dtype=torch.float32, shape=LINE):
    return {name: torch.empty(shape, device=device, dtype=dtype) for name in ("q", "k", "v")}


def test_devices_without_kernels():
    """Nothing falls back in silence: a tensor elsewhere is refused by name."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(NotImplementedError, match="query is on xpu"):
            swa(2, **fake_line("xpu"))
        assert swa(2, **fake_line("cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    ("what", "shape", "dtype", "message"),
    [
        ("dtype", LINE, torch.float64, "query has dtype torch.float64: on CUDA float32"),
        ("head_dim", (*LINE[:-1], 257), torch.float32, "query has head_dim 257: on CUDA at most"),
    ],
)
def test_what_cuda_kernels_do_not_do(what, shape, dtype, message):
    from torch._subclasses import FakeTensorMode

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(NotImplementedError, match=message),
    ):
        swa(2, **fake_line("cuda", dtype, shape))
