"""ggml's blocks of 32 quantized weights and MLX's affine groups of 32: the same numbers in two layouts.

A weight is `scale · q + bias` in MLX with unsigned q. ggml's `_1` blocks store a scale d and a minimum m: scale = d and
bias = m. Its `_0` blocks store d alone and centre q: bias = -2^(bits - 1) · d, exact in float16: a power of two.
"""

from __future__ import annotations

import numpy as np

GROUP = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}


def unpack_blocks(raw: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take ggml blocks apart.

    `raw` is uint8 `[..., bytes of a row]` of `kind`, a key of `BITS`. Returns q uint8 `[..., columns]`, unsigned, and
    scale and bias float16 `[..., columns / 32]`. Raises OverflowError where a bias has no float16.
    """
    bits = BITS[kind]
    size = 2 * (1 if kind.endswith("_0") else 2) + {4: 16, 5: 20, 8: 32}[bits]
    blocks = raw.reshape(*raw.shape[:-1], raw.shape[-1] // size, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if kind.endswith("_1"):
        bias = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
        body = blocks[..., 4:]
    else:
        wide = scale.astype(np.float32) * -(2 ** (bits - 1))
        if not np.all(np.abs(wide) <= np.finfo(np.float16).max):
            raise OverflowError
        bias = wide.astype(np.float16)
        body = blocks[..., 2:]
    if bits == 8:
        q = body ^ 0x80  # signed to unsigned: q + 128
    else:
        nibbles = body[..., -16:]  # byte j holds element j in its low half and element j + 16 in its high half
        q = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
    if bits == 5:
        fifth = np.unpackbits(np.ascontiguousarray(body[..., :4]), axis=-1, bitorder="little")
        q = q | (fifth << 4)
    return q.reshape(*raw.shape[:-1], -1), scale, bias


def unpack_mxfp4(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take blocks of 32 four-bit floats apart: codes uint8 `[..., columns]`, exponents uint8 `[..., columns / 32]`."""
    blocks = raw.reshape(*raw.shape[:-1], raw.shape[-1] // 17, 17)
    codes = np.concatenate([blocks[..., 1:] & 0x0F, blocks[..., 1:] >> 4], axis=-1)
    return codes.reshape(*raw.shape[:-1], -1), np.ascontiguousarray(blocks[..., 0])


def pack_affine(q: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned `q` uint8 `[..., columns]` as MLX packs it: lowest bits first, uint32 `[..., columns · bits / 32]`."""
    rows = q.reshape(-1, q.shape[-1])
    if bits == 8:
        packed = rows
    elif bits == 4:
        packed = rows[:, 0::2] | (rows[:, 1::2] << 4)
    else:
        planes = (rows[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
        packed = np.packbits(planes.reshape(rows.shape[0], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view(np.uint32).reshape(*q.shape[:-1], -1)


def unpack_affine(packed: np.ndarray, bits: int) -> np.ndarray:
    """The reverse of `pack_affine`: unsigned q, uint8 `[..., columns]`."""
    rows = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1]).view(np.uint8)
    if bits == 8:
        q = rows
    elif bits == 4:
        q = np.stack([rows & 0x0F, rows >> 4], axis=-1).reshape(rows.shape[0], -1)
    else:
        planes = np.unpackbits(rows, axis=-1, bitorder="little").reshape(rows.shape[0], -1, bits)
        q = np.packbits(planes, axis=-1, bitorder="little")[..., 0]
    return q.reshape(*packed.shape[:-1], -1)


def exact_kind(group_size: int, bits: int, mode: str, scale: np.ndarray, bias: np.ndarray) -> str | None:
    """The ggml kind that holds an affine-quantized matrix with no weight changed; None where there is none.

    `scale` and `bias` are float32 `[..., groups]`. ggml keeps them in float16, so each must have one; Q8_0 keeps no
    bias, so it must be -128 · scale. MXFP4 is one format in both, with exponents for scales.
    """
    if mode == "mxfp4":
        return "MXFP4"
    if mode != "affine" or group_size % GROUP or bits not in (4, 5, 8):
        return None
    if not np.array_equal(scale.astype(np.float16).astype(np.float32), scale):
        return None
    if bits == 8:
        return "Q8_0" if np.array_equal(bias, -128 * scale) else None
    return f"Q{bits}_1" if np.array_equal(bias.astype(np.float16).astype(np.float32), bias) else None


def pack_blocks(q: np.ndarray, scale: np.ndarray, bias: np.ndarray, kind: str) -> np.ndarray:
    """Put ggml blocks together, uint8 `[..., bytes of a row]`: the reverse of `unpack_blocks`.

    `kind` is one that `exact_kind` gave; groups of 64 or 128 weights are cut into blocks of 32 with the same scale.
    """
    blocks = q.reshape(*q.shape[:-1], -1, GROUP)
    repeat = blocks.shape[-2] // scale.shape[-1]

    if kind == "MXFP4":
        return np.concatenate([scale[..., None], _nibbles(blocks)], axis=-1).reshape(*q.shape[:-1], -1)

    def halves(values: np.ndarray) -> np.ndarray:
        return np.repeat(values.astype(np.float16), repeat, axis=-1)[..., None].view(np.uint8)

    parts = [halves(scale)] if kind == "Q8_0" else [halves(scale), halves(bias)]
    if kind == "Q8_0":
        parts.append(blocks ^ 0x80)
    else:
        if kind == "Q5_1":
            parts.append(np.packbits(blocks >> 4, axis=-1, bitorder="little"))
        parts.append(_nibbles(blocks))
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(*q.shape[:-1], -1)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """The low four bits of 32 elements in 16 bytes: byte j holds element j, and element j + 16 in its high half."""
    return (blocks[..., :16] & 0x0F) | (blocks[..., 16:] << 4)
