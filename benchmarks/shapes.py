"""Named matrix shapes, the sizes of their operands and the least time a product can take."""

from dataclasses import dataclass

from jax_mxfp4.format import BLOCK_SIZE

M_VALUES = tuple(2**i for i in range(13))

# Weights rotate through at least this much memory, five times the L2 cache of an H100, so that
# every call reads its weights from HBM as a model does.
ROTATION_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """A weight [N, K] and the name of the layer it is taken from."""

    name: str
    n: int
    k: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight in MXFP4: half a byte per element and one per block."""
        return self.n * self.k // 2 + self.n * self.k // BLOCK_SIZE

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the weight in bfloat16."""
        return 2 * self.n * self.k

    def flops(self, m: int) -> int:
        """Operations of a product with m rows, a multiplication and an addition counting two."""
        return 2 * m * self.n * self.k

    def activation_bytes(self, m: int) -> int:
        """Bytes of a bfloat16 input [m, K] and a bfloat16 output [m, N]."""
        return 2 * m * (self.n + self.k)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qkv", 5120, 2880),  # GPT-OSS, as are all before llama70b
        Shape("o_proj", 2880, 4096),
        Shape("gate_up", 5760, 2880),  # one expert
        Shape("down", 2880, 2880),  # one expert
        Shape("lm_head", 201088, 2880),
        Shape("llama70b_up", 28672, 8192),
        Shape("llama70b_down", 8192, 28672),
    )
}


def copies_of(weight_bytes: int, rotation_bytes: int = ROTATION_BYTES) -> int:
    """How many distinct copies of a weight make up at least `rotation_bytes`."""
    return max(1, -(-rotation_bytes // weight_bytes))


def floor_us(moved_bytes: int, flops: int, hbm_read_gbs: float, bf16_tflops: float) -> float:
    """The larger of the times for moving the bytes and for the arithmetic, in microseconds."""
    return max(moved_bytes / hbm_read_gbs * 1e-3, flops / bf16_tflops * 1e-6)


def calls_of(copies: int, floor: float, at_least: int = 200) -> int:
    """How many calls a timed program holds, given the time of one in microseconds.

    At least 200 and a whole number of rotations; of calls longer than 1 ms as many as take 50 ms,
    and no fewer than 8: the launch of the program is nothing beside them.
    """
    if floor > 1000:
        at_least = min(at_least, max(8, round(50_000 / floor)))
    return -(-at_least // copies) * copies
