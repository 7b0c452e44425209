"""Make `ggml_q4_k.npz`: what ggml's C code stores as Q4_K, decoded.

    python gen_q4_k.py path/to/libggml-base.so ../ggml_q4_k.npz

Any build of ggml will do. The file in this folder was made on 2026-11-22 with the one inside the
wheel of pywhispercpp 1.5.1 (ggml 0.13.1), and with gguf 0.19.0 to decode.
"""

import ctypes
import sys

import numpy as np
from gguf import GGMLQuantizationType, dequantize

SUPERBLOCK, BYTES = 256, 144


def main(library: str, output: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.standard_normal((10, SUPERBLOCK)),
            rng.standard_t(3, (10, SUPERBLOCK)),
            np.abs(rng.standard_normal((4, SUPERBLOCK))),
            -np.abs(rng.standard_normal((4, SUPERBLOCK))),
            np.full((1, SUPERBLOCK), 3.0),
            np.full((1, SUPERBLOCK), -3.0),
            np.zeros((1, SUPERBLOCK)),
            np.repeat([np.arange(8) == 3], 32, axis=1) * rng.standard_normal((1, SUPERBLOCK)),
        ]
    ).astype(np.float32)
    encoded = np.zeros((len(x), BYTES), np.uint8)
    encode = ctypes.CDLL(library).quantize_row_q4_K_ref
    encode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    encode(x.ctypes.data, encoded.ctypes.data, x.size)
    np.savez_compressed(output, x=x, decoded=dequantize(encoded, GGMLQuantizationType.Q4_K))


if __name__ == "__main__":
    main(*sys.argv[1:])
