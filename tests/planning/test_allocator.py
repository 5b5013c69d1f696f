"""The caching allocator's rules. Oracle: cases worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lownibble.planning.allocator import LARGE_ROUND, Allocator, reserved_bytes

MIB = 1 << 20


def test_a_small_tensor_takes_a_segment_of_two_mebibytes():
    assert reserved_bytes([(0, 1)]) == 2 * MIB


def test_small_tensors_share_a_segment_until_it_is_full():
    assert reserved_bytes([(i, MIB // 2) for i in range(4)]) == 2 * MIB
    assert reserved_bytes([(i, MIB // 2) for i in range(5)]) == 4 * MIB


def test_a_middling_tensor_takes_twenty_and_leaves_the_rest_to_others():
    assert reserved_bytes([(0, 2 * MIB), (1, 9 * MIB), (2, 8 * MIB)]) == 20 * MIB


def test_a_large_tensor_has_a_segment_of_its_own():
    assert reserved_bytes([(0, 10 * MIB + 1)]) == 12 * MIB


def test_a_freed_block_is_used_again_and_split():
    assert reserved_bytes([(0, 40 * MIB), (0, -40 * MIB), (1, 20 * MIB), (2, 20 * MIB)]) == 40 * MIB


def test_a_rest_of_one_mebibyte_is_not_split_off():
    assert reserved_bytes([(0, 40 * MIB), (0, -40 * MIB), (1, 39 * MIB), (2, MIB + 512)]) == 60 * MIB


def test_neighbours_that_are_free_are_joined():
    came = [(0, 40 * MIB), (0, -40 * MIB), (1, 20 * MIB), (2, 20 * MIB), (1, -20 * MIB), (2, -20 * MIB), (3, 40 * MIB)]
    assert reserved_bytes(came) == 40 * MIB


def test_segments_are_not_joined():
    assert reserved_bytes([(0, 20 * MIB), (1, 20 * MIB), (0, -20 * MIB), (1, -20 * MIB), (2, 40 * MIB)]) == 80 * MIB


def test_the_smallest_block_that_suffices_is_taken():
    came = [(0, 60 * MIB), (1, 30 * MIB), (0, -60 * MIB), (1, -30 * MIB), (2, 25 * MIB), (3, 60 * MIB)]
    assert reserved_bytes(came) == 90 * MIB


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 64 * MIB)), max_size=80))
def test_whatever_comes_and_goes(steps):
    allocator, live, highest, before = Allocator(), {}, 0, 0
    for number, (comes, n) in enumerate(steps):
        if comes or not live:
            allocator.allocate(number, n)
            live[number] = n
        else:
            key = list(live)[n % len(live)]
            allocator.free(key)
            del live[key]
        highest = max(highest, sum(live.values()))
        assert before <= allocator.reserved, "nothing is given back"
        assert allocator.reserved >= highest
        assert allocator.reserved % LARGE_ROUND == 0
        before = allocator.reserved
    for key in list(live):
        allocator.free(key)
    free = [size for pool in allocator._pools.values() for size, _, _ in pool.blocks]
    assert sum(free) == allocator.reserved, "all that was taken is free again"
