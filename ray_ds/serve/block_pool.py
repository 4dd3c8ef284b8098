"""Who has which block of the cache, and which blocks hold the beginning of what is asked next."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

KEY_BYTES = 16
"""128 bits: that two different texts get one key is less likely than a memory error that goes unseen."""


class BlockPool:
    """Counts the users of each block. A block that nobody uses keeps its content until it is needed.

    Content is known by a key, from `chain_keys`. Of the unused blocks those without a key go first, then the one that
    has not been used for the longest time.
    """

    def __init__(self, num_blocks: int, block_size: int, *, keeps: bool = True) -> None:
        """Take all blocks as empty.

        Args:
            keeps: whether content is kept for those who ask the same; without, no block has a key.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._keeps = keeps
        self._num_users = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Unused blocks with a key, the one unused for the longest time first."""
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, kept or empty."""
        return len(self._empty) + len(self._kept)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks a sequence takes."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """Return blocks with one user each, their content forgotten; None if there are not as many."""
        if count > self.num_free:
            return None
        blocks = [self._empty.pop() if self._empty else self._take_kept() for _ in range(count)]
        for block in blocks:
            self._num_users[block] = 1
        return blocks

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest run of known keys from the first on, each with one user more."""
        blocks = [self._block_of[key] for key in takewhile(self._block_of.__contains__, keys)]
        for block in blocks:
            self._kept.pop(block, None)
            self._num_users[block] += 1
        return blocks

    def name(self, block: int, key: bytes) -> None:
        """Make a used block's content known. Where another block has the same content, that one stays the known one."""
        if self._keeps and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take away one user of each of a sequence's blocks."""
        for block in reversed(blocks):  # a sequence's end is no use without its beginning, so it goes first
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)

    def forget(self, blocks: Sequence[int]) -> list[int]:
        """Take the keys away of used blocks whose content is spoilt; return those that have no other user."""
        for block in blocks:
            if block in self._key_of:
                del self._block_of[self._key_of.pop(block)]
        return [block for block in blocks if self._num_users[block] == 1]

    def _take_kept(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block


def chain_keys(tokens: Sequence[int], block_size: int, keys: list[bytes]) -> None:
    """Append the keys of the full blocks of `tokens` that `keys` does not have yet.

    A key stands for a block's tokens and all before them: it is a hash of the key before and the tokens.
    """
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        before = keys[-1] if keys else b""
        content = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + block_size])
        keys.append(hashlib.blake2b(before + content, digest_size=KEY_BYTES).digest())
