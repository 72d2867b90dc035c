"""Memory of a device by address: blocks, zeros, copies, and arrays of the host that are copied fast."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

_ALIGNED = 256


class Block:
    """Memory of a device that is there for as long as this is: allocated from the driver, and given back to it.

    ONNX Runtime's own allocators keep what they once had.

    Args:
        nbytes: its size.
        device, index: as of :class:`DeviceMemory`.
        what: what is in it, for messages.

    Attributes:
        address: where it begins, a multiple of 256.

    Raises:
        UnsupportedError: the device has not as much.
    """

    def __init__(self, nbytes: int, device: str, index: int, what: str) -> None:
        self.nbytes, self.device, self.index = nbytes, device, index
        if device == "cpu":
            self._array = np.empty(nbytes + _ALIGNED, np.uint8)
            self.address = -(-self._array.ctypes.data // _ALIGNED) * _ALIGNED
            return
        from planish.runtime.cuda import driver

        address = ctypes.c_uint64()
        with driver.current(index):
            code = driver.library().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        driver.check(code, f"{nbytes} bytes of {what} on GPU {index}")
        self.address = address.value
        # Not at exit: sessions may still be there that read it, and the process gives everything back.
        weakref.finalize(self, _free, address.value, index).atexit = False

    def write(self, offset: int, array: np.ndarray) -> None:
        """Copies a contiguous array to `offset`; it is there for every stream when this returns."""
        if offset < 0 or offset + array.nbytes > self.nbytes:
            raise ValueError(f"{array.nbytes} bytes at {offset} of {self.nbytes}")
        if self.device == "cpu":
            ctypes.memmove(self.address + offset, array.ctypes.data, array.nbytes)
            return
        from planish.runtime.cuda import driver

        with driver.current(self.index):
            memory = DeviceMemory(self.device, self.index)
            memory.upload(self.address + offset, array)
            memory.settle()  # from pageable memory the last part of a copy may be under way


def _free(address: int, index: int) -> None:
    from planish.runtime.cuda import driver

    with driver.current(index):
        driver.library().cuMemFree_v2(ctypes.c_uint64(address))


class DeviceMemory:
    """What is done with memory of a device beside running on it.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for memory of the host.
        index: the number of the GPU.
    """

    def __init__(self, device: str, index: int) -> None:
        self._cuda = None
        if device != "cpu":
            from planish.runtime.cuda import driver

            driver.enter(index)
            self._cuda = driver

    def host(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of the host that the GPU can read and write itself, of zeros."""
        if self._cuda is None:
            return np.zeros(shape, dtype)
        count = max(int(np.prod(shape)) * dtype.itemsize, 1)
        address = ctypes.c_void_p()
        code = self._cuda.library().cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(count), 1)
        self._cuda.check(code, f"{count} bytes of pinned memory")
        assert address.value is not None
        block = (ctypes.c_uint8 * count).from_address(address.value)
        weakref.finalize(block, self._cuda.library().cuMemFreeHost, address)
        ctypes.memset(address.value, 0, count)
        raw: np.ndarray = np.ctypeslib.as_array(block)
        return raw[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    def zero(self, address: int, count: int) -> None:
        """Zeros over `count` bytes, once what was started before is done."""
        if self._cuda is None:
            ctypes.memset(address, 0, count)
            return
        code = self._cuda.library().cuMemsetD8_v2(ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(count))
        self._cuda.check(code, f"clearing {count} bytes")

    def copy_rows(self, to: int, to_pitch: int, origin: int, pitch: int, width: int, count: int) -> None:
        """Copies `count` rows of `width` bytes that are `pitch` apart to rows that are `to_pitch` apart."""
        if not width or not count:
            return
        if self._cuda is not None:
            self._cuda.copy_rows(to, to_pitch, origin, pitch, width, count, 0)
            return
        for row in range(count):
            ctypes.memmove(to + row * to_pitch, origin + row * pitch, width)

    def settle(self) -> None:
        """Waits for what was started here; a session has a stream of its own, which does not."""
        if self._cuda is not None:
            self._cuda.check(self._cuda.library().cuStreamSynchronize(None), "copies on the GPU")

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copies an array of :meth:`host` to the device, and waits."""
        if self._cuda is None:
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
            return
        size = ctypes.c_size_t(array.nbytes)
        code = self._cuda.library().cuMemcpyHtoD_v2(ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), size)
        self._cuda.check(code, f"copying {array.nbytes} bytes to the GPU")

    def download(self, array: np.ndarray, address: int) -> None:
        """Copies from the device to an array of :meth:`host`, and waits."""
        if self._cuda is None:
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
            return
        size = ctypes.c_size_t(array.nbytes)
        code = self._cuda.library().cuMemcpyDtoH_v2(ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), size)
        self._cuda.check(code, f"copying {array.nbytes} bytes from the GPU")
