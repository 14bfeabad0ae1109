# SPDX-License-Identifier: Apache-2.0
"""A photograph and a text, turned into queries, keys and values whose attention means something.

Nothing is learned. An image token is a patch described by its colour, its low frequencies and its
edges, so a query attends patches that look like it. A text token is a byte; a query is the bytes up
to it, a key the bytes *before* its own, so a query attends bytes that once followed the same
letters.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnext.demo.errors import DemoError

PATCH = 8  # pixels a side
TOKENS = 4800  # image tokens aimed at: dense attention of this size still runs everywhere
TEXT_LENGTH = 8192  # bytes
IMAGE_DIM, TEXT_DIM = 32, 64
IMAGE_TEMPERATURE, TEXT_TEMPERATURES = 14.0, (12.0, 24.0, 16.0, 32.0)  # logits = temperature * cos
TEXT_ORDERS = (3, 5)  # bytes of context, one entry per key/value head


@dataclass(frozen=True)
class Picture:
    """Pixels ``[height, width, 3]`` in 0..1, a whole number of patches a side, and where from."""

    pixels: Tensor
    source: str

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.pixels.shape[0] // PATCH, self.pixels.shape[1] // PATCH


@dataclass(frozen=True)
class Text:
    """Bytes as int64 ``[length]`` and where from."""

    codes: Tensor
    source: str


@dataclass(frozen=True, eq=False)
class Inputs:
    """Query ``[B, *tokens, H, D]``, key and value ``[B, *tokens, Hkv, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def extents(self) -> tuple[int, ...]:
        """Tokens per axis."""
        return tuple(self.query.shape[1:-2])


def _of_eight_bits(image: Any) -> Any:
    """An image of wider numbers, whose white PIL would take for 255: integers up to 65,535 (or 255,
    if none is above), others as far as they go."""
    from PIL import Image

    numbers = np.asarray(image, dtype=np.float64)
    top = numbers.max(initial=0.0)
    white = (255.0 if top <= 255 else max(65535.0, top)) if image.mode[0] == "I" else top or 1.0
    return Image.fromarray((numbers.clip(0.0) / white * 255).round().astype(np.uint8))


def load_picture(path: Path | None) -> Picture:
    """The image at `path`, or the portrait of Grace Hopper that comes with matplotlib."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    source = str(path) if path is not None else "Grace Hopper, shipped with matplotlib"
    try:
        if path is None:
            from matplotlib.cbook import get_sample_data

            file = Path(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))
        else:
            file = path
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith(("I", "F")):
                upright = _of_eight_bits(upright)
            image = upright.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DemoError(f"cannot read an image from {source}: {error}") from error
    if min(image.size) < 2 * PATCH or max(image.size) > 12 * min(image.size):
        raise DemoError(
            f"the image {source} is {image.width} x {image.height}; allowed: at least "
            f"{2 * PATCH} pixels a side and at most 12 times as long as wide"
        )
    factor = math.sqrt(TOKENS * PATCH**2 / (image.width * image.height))
    width, height = (max(8, round(side * factor / PATCH)) * PATCH for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return Picture(torch.from_numpy(pixels / 255.0), source)


def load_text(path: Path | None) -> Text:
    """The head of the file at `path`, or of the language reference that ships with Python."""
    if path is not None:
        source = str(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DemoError(f"cannot read a text from {source}: {error}") from error
    else:
        source = "Python's language reference, shipped with Python"
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:
            raise DemoError(
                f"this Python comes without its reference; give --text: {error}"
            ) from error
        chosen = ("class", "function", "try", "with", "for", "while", "import", "assignment")
        raw = "\n".join(topics[name] for name in chosen if name in topics).encode()
    raw = raw[:TEXT_LENGTH]
    if len(raw) < 1024:
        raise DemoError(f"the text {source} has {len(raw)} bytes; allowed: at least 1024")
    return Text(torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).astype(np.int64)), source)


def _patches(plane: Tensor, patch: int) -> Tensor:
    """``[height, width]`` to ``[rows, columns, patch, patch]``."""
    return plane.unfold(0, patch, patch).unfold(1, patch, patch)


def _cosine_basis(size: int) -> Tensor:
    """The orthonormal DCT-II of `size` points, a row per frequency."""
    k, n = torch.arange(size)[:, None], torch.arange(size)[None, :]
    basis = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()


def _standardise(features: Tensor) -> Tensor:
    """Zero mean, unit variance over the tokens; columns that do not vary become 0."""
    flat = features.flatten(0, 1)
    return (features - flat.mean(0)) / flat.std(0).clamp_min(1e-6)


def describe(pixels: Tensor, patch: int = PATCH) -> list[Tensor]:
    """Colour ``[h, w, 3]``, texture ``[h, w, 14]`` and edges ``[h, w, 8]`` of each patch."""
    red, green, blue = pixels.unbind(-1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    opponent = torch.stack((luma, red - green, 0.5 * (red + green) - blue))
    colour = torch.stack([_patches(plane, patch).mean((-2, -1)) for plane in opponent], -1)

    basis = _cosine_basis(patch)
    spectrum = basis @ _patches(luma, patch) @ basis.T
    low = [(r, c) for r in range(5) for c in range(5) if 0 < r + c < 5]
    texture = torch.stack([spectrum[..., r, c].abs().add(1e-2).log() for r, c in low], -1)

    down, across = torch.gradient(luma)
    strength, turn = torch.hypot(down, across), torch.atan2(down, across) / math.pi * 4.0
    edges = torch.stack(
        [
            _patches(
                strength * (1.0 - (turn - centre + 4.0).remainder(8.0).sub(4.0).abs()).clamp_min(0),
                patch,
            )
            .mean((-2, -1))
            .sqrt()
            for centre in range(8)
        ],
        -1,
    )
    return [_standardise(group) for group in (colour, texture, edges)]


def image_inputs(pixels: Tensor, patch: int = PATCH) -> Inputs:
    """Four heads on patch features: by colour, by texture, by edges, by all three.

    The features keep their inner products (an orthonormal projection widens them to the head
    dimension), so a logit is ``IMAGE_TEMPERATURE`` times the cosine of two patches' descriptions.
    The value of a token is its description, its first three entries the colour.
    """
    groups = describe(pixels, patch)
    widths = [group.shape[-1] for group in groups]
    generator = torch.Generator().manual_seed(0)
    mixes = ((1.0, 0.1, 0.1), (0.2, 1.0, 0.2), (0.2, 0.2, 1.0), (1.0, 0.6, 0.6))
    heads = []
    for mix in mixes:
        weighted = [w * g / math.sqrt(n) for w, g, n in zip(mix, groups, widths, strict=True)]
        features = torch.nn.functional.normalize(torch.cat(weighted, -1), dim=-1)
        square = torch.randn(IMAGE_DIM, IMAGE_DIM, generator=generator)
        heads.append(features @ torch.linalg.qr(square).Q[: sum(widths)])
    unit = torch.stack(heads, 2)[None]
    query = unit * math.sqrt(IMAGE_TEMPERATURE * math.sqrt(IMAGE_DIM))
    described = torch.nn.functional.pad(torch.cat(groups, -1), (0, IMAGE_DIM - sum(widths)))
    value = described[None, :, :, None].expand(-1, -1, -1, len(mixes), -1).contiguous()
    return Inputs(query, query.clone(), value)


def clip_inputs(picture: Picture, frames: int = 4) -> Inputs:
    """A clip ``[1, frames, h, w, 4, D]``: the camera pans by half a patch of 16 pixels a frame."""
    patch, step = 2 * PATCH, PATCH
    height, width = (side // patch * patch for side in picture.pixels.shape[:2])
    shots = [
        image_inputs(torch.roll(picture.pixels, -step * f, 1)[:height, :width], patch)
        for f in range(frames)
    ]
    return Inputs(
        torch.stack([shot.query for shot in shots], 1),
        torch.stack([shot.key for shot in shots], 1),
        torch.stack([shot.value for shot in shots], 1),
    )


def byte_embedding() -> Tensor:
    """A fixed random unit vector per byte, ``[256, D]``: the value of a text token."""
    table = torch.randn(256, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(table, dim=-1)


def text_inputs(text: Text) -> Inputs:
    """Four query heads on two key/value heads: ``[1, N, 4, D]`` and ``[1, N, 2, D]``.

    Query i is the sum of the embeddings of bytes i, i-1, ..; key j that of bytes j-1, j-2, .., each
    place with its own embedding. A key whose context equals the query's has cosine 1, and its
    value, byte j, is then a good guess for byte i+1.
    """
    generator = torch.Generator().manual_seed(2)
    longest = max(TEXT_ORDERS)
    tables = torch.randn(longest, 256, TEXT_DIM, generator=generator) / math.sqrt(TEXT_DIM)
    padded = torch.nn.functional.pad(text.codes, (longest, 0))
    ends = torch.arange(longest, longest + text.codes.numel())

    def context(end: Tensor, order: int) -> Tensor:
        places = sum(tables[back][padded[end - back]] for back in range(order))
        assert isinstance(places, Tensor)
        return torch.nn.functional.normalize(places, dim=-1)

    group = len(TEXT_TEMPERATURES) // len(TEXT_ORDERS)
    queries = [
        context(ends, TEXT_ORDERS[head // group]) * temperature * math.sqrt(TEXT_DIM)
        for head, temperature in enumerate(TEXT_TEMPERATURES)
    ]
    keys = [context(ends - 1, order) for order in TEXT_ORDERS]
    value = byte_embedding()[text.codes][:, None].expand(-1, len(TEXT_ORDERS), -1).contiguous()
    return Inputs(torch.stack(queries, 1)[None], torch.stack(keys, 1)[None], value[None])


def next_byte_score(text: Text, output: Tensor) -> tuple[float, float]:
    """Share of bytes guessed right from the byte before, and by always saying the commonest one."""
    guess = (output[0].mean(1) @ byte_embedding().T).argmax(-1)[:-1]
    truth = text.codes[1:]
    commonest = torch.bincount(truth).max().item() / truth.numel()
    return (guess == truth).float().mean().item(), commonest
