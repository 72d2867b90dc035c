from __future__ import annotations

import ctypes

import numpy as np

from planish.runtime.offload.region import Allocator, Region


def test_blocks_do_not_overlap_and_all_comes_back() -> None:
    random = np.random.default_rng(0)
    region = Region(1 << 20, 64 << 10)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(2000):
        if held and random.random() < 0.5:
            address = list(held)[int(random.integers(len(held)))]
            assert region.give(address)
            del held[address]
            continue
        size = int(random.integers(1, 9000))
        taken = region.take(size)
        if taken is None:
            refused += 1
            continue
        assert taken % 256 == 0 and taken >= (1 << 20) and taken + size <= (1 << 20) + (64 << 10)
        assert all(taken + size <= other or other + n <= taken for other, n in held.items())
        held[taken] = size
    assert refused and region.peak <= region.nbytes
    for address in held:
        assert region.give(address)
    assert region.used == 0 and region.take(64 << 10) == 1 << 20


def test_a_block_of_somebody_else_is_not_taken_back() -> None:
    region = Region(0, 1024)
    assert not region.give(512)
    assert Region(0, 0).take(1) is None


def test_calls_give_blocks_of_the_region_and_constants_of_the_device() -> None:
    made: list[int] = []
    gone: list[int] = []

    def allocate(nbytes: int) -> int:
        if nbytes > 1000:
            raise MemoryError
        made.append(nbytes)
        return 77 << 20

    allocator = Allocator(allocate, gone.append)
    options = allocator.options()
    take = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(int(options["gpu_external_alloc"]))
    give = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(options["gpu_external_free"]))
    allocator.region = Region(1 << 20, 1024)
    first = take(1000)
    assert first == 1 << 20 and take(100) is None and allocator.lacking == 100
    give(first)
    assert allocator.region.used == 0
    allocator.constants = True
    kept = take(500)
    assert kept == 77 << 20 and made == [500] and take(2000) is None and allocator.lacking == 2000
    allocator.constants = False
    give(kept)
    assert gone == [77 << 20]
