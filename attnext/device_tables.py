# SPDX-License-Identifier: Apache-2.0
"""The geometry's tables on a GPU: uploaded once, and never freed under a kernel that reads them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_KEPT = 64  # the layers of a model share a few
_KEPT_BYTES = 2**28

_Key = tuple[Any, int]  # tables and the index of a device


class DeviceTables:
    """Uploads, least recently used out first.

    An upload is waited for, so that any stream may read it; it has a stream of its own, so that the
    wait is for the copy and not for the work that the caller has queued. Other streams than that
    are noted with the allocator: what is dropped here is reused only after they are done with it.
    A CUDA graph reads the tables at each replay: what a graph has recorded is kept for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: OrderedDict[_Key, Tensor] = OrderedDict()
        self._readers: dict[_Key, set[int]] = {}
        self._recorded: dict[_Key, Tensor] = {}
        self._bytes = 0
        self._streams: dict[int, torch.cuda.Stream] = {}

    def get(self, tables: Any, device: torch.device, op: str) -> Tensor:
        """The tables on the current device, for a kernel on its current stream. The binary gives
        the same object for the same geometry. Errors: RuntimeError, if a graph is being captured
        and they are not there yet."""
        key = (tables, device.index)
        capturing = torch.cuda.is_current_stream_capturing()
        with self._lock:
            found = self._recorded.get(key)
            if found is not None:
                return found
            found = self._recent.get(key)
            if found is None and capturing:
                raise RuntimeError(
                    f"attnext {op}: its tables are not on {device} yet, and a CUDA graph cannot "
                    "record their upload; warm up: call it with the same shapes and options, and "
                    "with gradients if the graph has them, before the capture"
                )
            if found is None:
                found = self._upload(tables, device)
                self._recent[key], self._readers[key] = found, set()
                self._bytes += found.nbytes
                self._drop()
            else:
                self._recent.move_to_end(key)
            if capturing:
                self._recorded[key] = found
                del self._recent[key], self._readers[key]
                self._bytes -= found.nbytes
                return found
            stream = torch.cuda.current_stream(device)
            readers = self._readers[key]
            if stream.cuda_stream not in readers:
                readers.add(stream.cuda_stream)
                found.record_stream(stream)
            return found

    def _upload(self, tables: Any, device: torch.device) -> Tensor:
        host = torch.frombuffer(bytearray(tables.data()), dtype=torch.int32)
        stream = self._streams.get(device.index)
        if stream is None:
            stream = self._streams[device.index] = torch.cuda.Stream(device)
        with torch.cuda.stream(stream), torch.inference_mode(False):
            return host.to(device)

    def _drop(self) -> None:
        while len(self._recent) > _KEPT or (self._bytes > _KEPT_BYTES and len(self._recent) > 1):
            key, oldest = self._recent.popitem(last=False)
            del self._readers[key]
            self._bytes -= oldest.nbytes
