"""Ask ptxas which NVIDIA targets have which instructions that matter for MXFP4.

    python docs/figures/ptx_support.py

writes ptx_support.json beside this file: for each instruction and target the smallest PTX ISA
version that ptxas accepts, or null. Needs ptxas on the PATH, no GPU, and about a minute.

Acceptance means that the instruction exists for that target; it says nothing about speed.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent

# "f" and "a" targets add what is specific to a family and to one architecture.
TARGETS = (
    *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"),
    *("sm_100", "sm_100f", "sm_100a", "sm_103", "sm_103f", "sm_103a"),
    *("sm_110", "sm_110f", "sm_110a", "sm_120", "sm_120f", "sm_120a"),
    *("sm_121", "sm_121f", "sm_121a"),
)

PTX_VERSIONS = ("6.5", "7.0", "7.1", "7.8", "8.0", "8.1", "8.4", "8.6", "8.7", "8.8", "9.0")

_D = "{%f0,%f1,%f2,%f3}"
_A = "{%r0,%r1,%r2,%r3}"
_B = "{%r4,%r5}"
_SCALED = f"{_D}, {_A}, {_B}, {_D}, %r6, {{0,0}}, %r7, {{0,0}};"
_TCGEN05_SCALED = "[%r0], %rd0, %rd1, %r1, [%r2], [%r3], %p0;"

INSTRUCTIONS = {
    "mma f16 -> f32": f"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {_D}, {{%r0,%r1}}, "
    f"{{%r4}}, {_D};",
    "mma bf16 -> f32": f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {_D}, {_A}, {_B}, "
    f"{_D};",
    "mma e4m3 -> f32": f"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {_D}, {_A}, {_B}, "
    f"{_D};",
    "wgmma bf16": f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {_D}, %rd0, %rd1, %p0, "
    "1, 1, 0, 0;",
    "wgmma e4m3": f"wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {_D}, %rd0, %rd1, %p0, "
    "1, 1;",
    "cvt e2m1x2 -> f16x2": "cvt.rn.f16x2.e2m1x2 %r0, %b0;",
    "cvt f32 -> e2m1x2": "cvt.rn.satfinite.e2m1x2.f32 %b0, %f0, %f1;",
    "cvt ue8m0x2 -> bf16x2": "cvt.rn.bf16x2.ue8m0x2 %r0, %h0;",
    "cvt f32 -> ue8m0x2": "cvt.rp.satfinite.ue8m0x2.f32 %h0, %f0, %f1;",
    "mma mxf4 (MXFP4 x MXFP4)": "mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X.m16n8k64"
    f".row.col.f32.e2m1.e2m1.f32.ue8m0 {_SCALED}",
    "mma mxf8f6f4 (MXFP8 x MXFP4)": "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X"
    f".m16n8k32.row.col.f32.e4m3.e2m1.f32.ue8m0 {_SCALED}",
    "mma mxf4nvf4 (NVFP4)": "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64"
    f".row.col.f32.e2m1.e2m1.f32.ue4m3 {_SCALED}",
    "tcgen05 f16": "tcgen05.mma.cta_group::1.kind::f16 [%r0], %rd0, %rd1, %r1, %p0;",
    "tcgen05 mxf4 (MXFP4 x MXFP4)": "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32 "
    f"{_TCGEN05_SCALED}",
    "tcgen05 mxf8f6f4 (MXFP8 x MXFP4)": "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"
    f".block32 {_TCGEN05_SCALED}",
    "tcgen05 mxf4nvf4 (NVFP4)": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 "
    f"{_TCGEN05_SCALED}",
}


def accepts(ptxas: str, instruction: str, target: str, version: str) -> bool:
    """Whether ptxas assembles `instruction` for `target` from PTX of `version`."""
    program = f""".version {version}
.target {target}
.address_size 64
.visible .entry probe() {{
  .reg .pred %p<2>; .reg .b8 %b<2>; .reg .b16 %h<2>; .reg .b32 %r<8>; .reg .b64 %rd<2>;
  .reg .f32 %f<4>;
  {instruction}
  ret;
}}
"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.ptx")
        source.write_text(program)
        command = [ptxas, f"-arch={target}", str(source), "-o", str(Path(folder, "probe.cubin"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def smallest_version(ptxas: str, instruction: str, target: str) -> str | None:
    """The smallest of `PTX_VERSIONS` that works, or None where the newest does not."""
    if not accepts(ptxas, instruction, target, PTX_VERSIONS[-1]):
        return None
    return next(v for v in PTX_VERSIONS if accepts(ptxas, instruction, target, v))


def main() -> None:
    """Probe everything and write the JSON file."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        sys.exit("ptxas is not on the PATH; it comes with the CUDA toolkit")
    banner = subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout
    results = {
        "ptxas": banner.strip().splitlines()[-2],
        "date": "2026-11-22",
        "smallest_ptx_version": {
            name: {target: smallest_version(ptxas, instruction, target) for target in TARGETS}
            for name, instruction in INSTRUCTIONS.items()
        },
    }
    (FOLDER / "ptx_support.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
