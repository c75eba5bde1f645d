"""What a GPU can do at most, by its data sheet: the time below which no kernel comes.

Williams, Waterman, Patterson 2009, "Roofline": time >= max(bytes / bandwidth, FLOPs / peak).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks of NVIDIA's data sheets, dense: GB/s, and TFLOP/s accumulated in float32."""

    arch: int  # compute capability, 90 for 9.0
    multiprocessors: int
    bandwidth: float
    half: float  # bfloat16 and float16, tensor cores
    tf32: float
    fp32: float  # no tensor cores

    def flops(self, kind: str | None) -> float:
        """FLOP/s for a tl.dot of this kind (Built.dot); None: arithmetic outside tl.dot."""
        rates = {"bf16": self.half, "f16": self.half, "tf32": self.tf32, "tf32x3": self.tf32 / 3}
        return 1e12 * rates.get(kind or "", self.fp32)

    def seconds(self, moved: float, flops: float = 0.0, kind: str | None = None) -> float:
        """The roofline's time for bytes moved and FLOPs."""
        return max(moved / (self.bandwidth * 1e9), flops / self.flops(kind))


GPUS = {
    "A100": Gpu(80, 108, 2039, 312, 156, 19.5),  # SXM, 80 GB
    "H100": Gpu(90, 132, 3350, 989, 495, 67),  # SXM
    "H200": Gpu(90, 132, 4800, 989, 495, 67),  # SXM
    "RTX 4090": Gpu(89, 128, 1008, 165, 82.6, 82.6),
    "B200": Gpu(100, 148, 8000, 2250, 1125, 75),  # HGX
}


def named(device: str) -> Gpu | None:
    """The data sheet that a device's name, such as "NVIDIA H200", belongs to."""
    words = device.upper().replace("-", " ")
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
