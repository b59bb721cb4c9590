"""Names, order and values of a decoder's tensors in GGUF files."""

import numpy as np

from exporter.formats.group import WeightGroup
from exporter.model.blocks import Vector
from exporter.model.decoder import HEAD, Decoder

EMBEDDING_NAME, HEAD_NAME = "token_embd.weight", "output.weight"


def gguf_names(decoder: Decoder) -> dict[str, str]:
    """Return Hugging Face name -> GGUF name of every tensor, and of a head even if the decoder's is tied.

    Matrices whose rows are in one tensor have its name.
    """
    tensors, final_norm = decoder.family.gguf.tensors, decoder.family.gguf.final_norm
    pairs = {decoder.embedding.name: EMBEDDING_NAME, decoder.final_norm.name: final_norm, HEAD: HEAD_NAME}
    outside = {one.name: one.role for one in decoder.tables[1:]} | {one.name: one.role for one in decoder.before_layers}
    pairs |= {name: decoder.family.gguf.outside[role] for name, role in outside.items()}
    for block in decoder.blocks:
        named = {linear.group.name: linear.group.role for linear in block.linears.values()}
        named |= {vector.name: vector.role for vector in block.vectors}
        pairs |= {name: f"blk.{block.layer}.{tensors[role]}" for name, role in named.items()}
    return pairs


def gguf_matrices(decoder: Decoder) -> dict[str, tuple[WeightGroup, ...]]:
    """Return GGUF name -> the matrices whose rows the tensor holds, in order; in the order of computation."""
    names, found = gguf_names(decoder), dict[str, tuple[WeightGroup, ...]]()
    for group in decoder.groups():
        found[names[group.name]] = (*found.get(names[group.name], ()), group)
    return found


def first_rows(decoder: Decoder) -> dict[str, int]:
    """Return name of each matrix -> the row of its tensor at which it begins; stacked ones follow one another."""
    found = dict[str, int]()
    for groups in gguf_matrices(decoder).values():
        before = 0
        for group in groups:
            found[group.name] = before
            before += group.rows
    return found


def gguf_vectors(decoder: Decoder) -> dict[str, Vector]:
    """Return GGUF name -> vector, in the order of files; a file holds a norm's gain, offset included."""
    names = gguf_names(decoder)
    return {names[vector.name]: vector for vector in decoder.all_vectors()}


def gguf_shape(vector: Vector) -> tuple[int, ...]:
    """Return the shape of a vector in files: [width], [width, positions] or, of a projection, [rows, width]."""
    if vector.rows is not None:
        return vector.shape
    return (vector.width,) if vector.kernel is None else (vector.width, vector.kernel)


def gguf_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Return GGUF name -> shape of every tensor of a decoder: rows of several matrices, or a stack of experts'."""
    found = {name: gguf_shape(vector) for name, vector in gguf_vectors(decoder).items()}
    for name, groups in gguf_matrices(decoder).items():
        one = groups[0]
        stacked = one.expert is not None
        found[name] = (len(groups), one.rows, one.columns) if stacked else (sum(g.rows for g in groups), one.columns)
    return found


def row_order(decoder: Decoder, group: WeightGroup) -> np.ndarray | None:
    """Return the source row of each stored row of a matrix, or None if the order is the same."""
    linear = decoder.linear(group)
    if linear is None or not linear.rotary_heads or not decoder.family.gguf.interleaved_rotary:
        return None
    return interleaved_rows(group.rows, linear.rotary_heads)


def interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Return the Hugging Face row of each GGUF row of a query or key matrix.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head; transformers rotates rows i and i + half.
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, 2, half).swapaxes(1, 2).reshape(rows)


def in_source_order(stored: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Return rows in the source's order, given the order in which they are stored."""
    if order is None:
        return stored
    rows = np.empty_like(stored)
    rows[order] = stored
    return rows
