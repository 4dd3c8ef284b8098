import random

import pytest

from ray_ds.serve.block_pool import BlockPool, chain_keys


def keys_of(tokens: list[int], size: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    chain_keys(tokens, size, keys)
    return keys


def test_a_key_stands_for_all_tokens_up_to_its_blocks_end() -> None:
    tokens = list(range(1000, 1011))
    assert len(keys_of(tokens)) == 2, "the third block is not full"
    assert keys_of(tokens[:8]) == keys_of(tokens)
    for changed in range(8):
        other = [*tokens]
        other[changed] += 1
        same = [a == b for a, b in zip(keys_of(tokens), keys_of(other), strict=True)]
        assert same == [changed >= 4, False]
    assert keys_of([1, 0, 0, 0]) != keys_of([256, 0, 0, 0]), "ids are not run together"


def test_keys_grow_with_the_tokens() -> None:
    tokens = list(range(40))
    keys: list[bytes] = []
    for end in (3, 4, 17, 40):
        chain_keys(tokens[:end], 4, keys)
        assert keys == keys_of(tokens[:end])


def test_unused_content_is_found_until_its_block_is_needed() -> None:
    pool = BlockPool(4, 4)
    first, second = keys_of(list(range(8))), keys_of(list(range(50, 58)))
    for keys in (first, second):
        blocks = pool.take(2)
        for block, key in zip(blocks, keys, strict=True):
            pool.name(block, key)
        pool.give_back(blocks)
    assert pool.num_free == 4
    (one,) = pool.take(1)  # the end of what has been unused the longest goes first
    assert len(pool.share(first)) == 1
    assert len(pool.share(second)) == 2
    assert pool.num_free == 0 and pool.take(1) is None
    pool.give_back([one])
    assert pool.num_free == 1


def test_a_block_is_free_only_once_its_last_user_is_gone() -> None:
    pool = BlockPool(2, 4)
    blocks, keys = pool.take(1), keys_of([1, 2, 3, 4])
    pool.name(blocks[0], keys[0])
    assert pool.share(keys) == blocks
    pool.give_back(blocks)
    assert pool.num_free == 1
    pool.give_back(blocks)
    assert pool.num_free == 2


def test_spoilt_content_is_not_found_and_its_only_users_blocks_are_told() -> None:
    pool = BlockPool(3, 4)
    blocks, keys = pool.take(2), keys_of(list(range(8)))
    for block, key in zip(blocks, keys, strict=True):
        pool.name(block, key)
    pool.share(keys[:1])
    assert pool.forget(blocks) == blocks[1:]
    assert pool.share(keys) == []


def test_nothing_is_kept_where_nothing_is_to_be_found() -> None:
    pool = BlockPool(2, 4, keeps=False)
    blocks, keys = pool.take(1), keys_of([1, 2, 3, 4])
    pool.name(blocks[0], keys[0])
    pool.give_back(blocks)
    assert pool.share(keys) == []


@pytest.mark.parametrize("seed", range(5))
def test_no_block_has_two_owners_and_none_is_lost(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(12, 2)
    held: list[tuple[list[int], list[bytes]]] = []
    content: dict[int, bytes] = {}
    for _ in range(2000):
        if held and draw.random() < 0.5:
            blocks, _ = held.pop(draw.randrange(len(held)))
            pool.give_back(blocks)
        else:
            keys = keys_of([draw.randrange(2) for _ in range(2 * draw.randrange(1, 5))], 2)
            shared = pool.share(keys)
            assert [content[block] for block in shared] == keys[: len(shared)]
            fresh = pool.take(len(keys) - len(shared))
            if fresh is None:
                pool.give_back(shared)
                continue
            assert not set(fresh) & {block for blocks, _ in held for block in blocks}
            for block, key in zip(fresh, keys[len(shared) :], strict=True):
                content[block] = key
                pool.name(block, key)
            held.append((shared + fresh, keys))
        assert pool.num_free == 12 - len({block for blocks, _ in held for block in blocks})
