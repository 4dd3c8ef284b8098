"""Rows that hold several documents: which token belongs to which, and what it may look at."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def number_documents(tokens: Tensor, bos_token_id: int) -> Tensor:
    """Return `segments` of rows in which each document starts with BOS: (B, T) int64, counting from the row's start."""
    return (tokens == bos_token_id).cumsum(dim=1)


def document_positions(segments: Tensor) -> Tensor:
    """Return each token's distance from the start of its document, (B, T)."""
    places = torch.arange(segments.shape[1], device=segments.device)  # (T,)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(is_start, places, 0).cummax(dim=1).values  # (B, T)
    return places - starts


def document_mask(segments: Tensor) -> Tensor:
    """Return which token (second place) sees which (third): itself and earlier ones of its document, (B, 1, T, T)."""
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return same.tril()[:, None]


def document_block_mask(segments: Tensor) -> BlockMask:
    """Return the same for FlexAttention, which skips the blocks of tokens that do not see each other."""
    rows, length = segments.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments[row, query] == segments[row, key])

    return create_block_mask(sees, rows, None, length, length, device=segments.device)
