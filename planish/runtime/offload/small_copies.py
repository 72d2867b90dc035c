"""Small copies between a GPU and pinned memory by a kernel: a copy engine would begin them after all that it holds.

A step with attention on the host exchanges some kilobytes for each layer while megabytes of weights are on their way.
Copy engines take their work in order, so such a copy would wait for the weights of a layer; a kernel reads and writes
pinned memory beside them.
"""

from __future__ import annotations

import ctypes

from planish.runtime.cuda.driver import Module

#: Larger copies are worth an engine, in bytes.
LARGEST = 256 << 10
_THREADS = 256
#: Sixteen bytes for each thread, and what is left one by one.
_PTX = b"""
.version 6.4
.target sm_75
.address_size 64
.visible .entry planish_copy(.param .u64 to, .param .u64 origin, .param .u32 size)
{
  .reg .pred %p<4>;
  .reg .b16 %h<2>;
  .reg .b32 %r<12>;
  .reg .b64 %a<8>;
  ld.param.u64 %a1, [to];
  ld.param.u64 %a2, [origin];
  ld.param.u32 %r1, [size];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.u32 %r5, %r2, %r3, %r4;
  shr.u32 %r6, %r1, 4;
  setp.ge.u32 %p1, %r5, %r6;
  @%p1 bra REST;
  mul.wide.u32 %a3, %r5, 16;
  add.u64 %a4, %a1, %a3;
  add.u64 %a5, %a2, %a3;
  ld.global.v4.u32 {%r7, %r8, %r9, %r10}, [%a5];
  st.global.v4.u32 [%a4], {%r7, %r8, %r9, %r10};
REST:
  setp.ge.u32 %p2, %r5, 16;
  @%p2 bra DONE;
  shl.b32 %r11, %r6, 4;
  add.u32 %r11, %r11, %r5;
  setp.ge.u32 %p3, %r11, %r1;
  @%p3 bra DONE;
  cvt.u64.u32 %a6, %r11;
  add.u64 %a4, %a1, %a6;
  add.u64 %a5, %a2, %a6;
  ld.global.u8 %h1, [%a5];
  st.global.u8 [%a4], %h1;
DONE:
  ret;
}
\0"""


class SmallCopies:
    """The kernel, in the context that is current when this is made."""

    def __init__(self) -> None:
        self._kernel = Module(_PTX).function("planish_copy")

    @staticmethod
    def takes(target: int, source: int, nbytes: int) -> bool:
        """Whether the kernel is the way for a copy."""
        return 0 < nbytes <= LARGEST and not (target | source) % 16

    def __call__(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Puts a copy of `nbytes` into a stream; both addresses are the device's own or of pinned memory."""
        blocks = -(-max(-(-nbytes // 16), 16) // _THREADS)
        arguments = ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_uint32(nbytes)
        self._kernel.launch((blocks, 1, 1), _THREADS, stream, *arguments)
