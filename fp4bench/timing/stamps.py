"""Clock stamps on the device: every SM writes its cycle counter and the GPU's nanosecond timer, as part of a CUDA graph.

Needs Triton. Two stamps bracket work on one stream; their difference is free of launch overheads and says at which SM clock the
work ran, which NVML's reading does not (1965 to 1980 MHz where a BF16 GEMM ran at 1805, NVIDIA H200).
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _stamp(out, slots):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Write (%globaltimer, %clock64) of this block's SM to out[%smid], int64, if there is such a slot."""
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    nanoseconds = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(out + 2 * sm, nanoseconds, mask=sm < slots)
    tl.store(out + 2 * sm + 1, cycles, mask=sm < slots)


# One binary for all lengths: it is loaded before a graph is captured, and not for the first time while one is.
@triton.jit(do_not_specialize=["nanoseconds"])
def _spin(nanoseconds, told):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Keep the stream busy for so long by %globaltimer, and write how long it was to told, int64, unless that is None."""
    start = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = start
    while now - start < nanoseconds:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    if told is not None:
        tl.store(told, now - start)


def spin(nanoseconds: int, told: torch.Tensor | None = None) -> None:
    """Queue a delay of `nanoseconds` on the current stream; the launch itself takes about a microsecond more.

    told: int64 of one element, where it writes how many nanoseconds passed.
    """
    _spin[(1,)](nanoseconds, told, num_warps=1)


@dataclass(frozen=True)
class Elapsed:
    """Time between two stamps: the median over SMs. The SMs' mean clock is `cycles / seconds`."""

    seconds: float
    cycles: float


class Stamps:
    """Pairs of stamps for one graph, `pairs` of them, on a GPU of `sm_count` SMs.

    A stamp launches one block an SM on an idle chip, so that each SM gets one. An SM that got none is left out.
    """

    def __init__(self, pairs: int, sm_count: int, device: str) -> None:
        # %smid may be larger than the number of SMs in use: NVIDIA promises no more than that it is below %nsmid.
        self._slots = 2 * sm_count
        self._sm_count = sm_count
        self._written = torch.zeros(pairs, 2, self._slots, 2, dtype=torch.int64, device=device)
        self._host = torch.zeros(self._written.shape, dtype=torch.int64, pin_memory=True)

    def start(self, pair: int = 0) -> None:
        """Queue the first stamp of a pair on the current stream."""
        _stamp[(self._sm_count,)](self._written[pair, 0], self._slots, num_warps=1)

    def stop(self, pair: int = 0) -> None:
        """Queue the second stamp of a pair on the current stream."""
        _stamp[(self._sm_count,)](self._written[pair, 1], self._slots, num_warps=1)

    def clear(self) -> None:
        """Queue the erasure of all stamps, before a replay."""
        self._written.zero_()

    def fetch(self) -> None:
        """Queue the copy of all stamps to the host."""
        self._host.copy_(self._written, non_blocking=True)

    def read(self) -> list[Elapsed]:
        """The elapsed time of each pair, after `fetch` and a synchronization. Raises RuntimeError without any."""
        return [elapsed(pair) for pair in self._host.numpy()]


def elapsed(stamps: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> Elapsed:
    """Elapsed time of one pair of stamps, int64 (2, slots, 2): start and stop; SM; nanoseconds and cycles, 0 if not written."""
    start, stop = stamps
    both = (start[:, 0] != 0) & (stop[:, 0] != 0)
    if not both.any():
        raise RuntimeError("no SM wrote both clock stamps")
    nanoseconds, cycles = np.median((stop - start)[both], axis=0)
    return Elapsed(float(nanoseconds) * 1e-9, float(cycles))
