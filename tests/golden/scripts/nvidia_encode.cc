// Encodes MXFP4 blocks with the conversions of NVIDIA's own headers, compiled for the host:
// scale = amax / 6 rounded up to a power of two (cuda_fp8.h), elements to nearest even
// (cuda_fp4.h).
//
// Build: g++ -O2 -std=c++17 -I$CUDA_HOME/include nvidia_encode.cc -o nvidia_encode
// stdin: float32 blocks of 32. stdout: for each block its scale byte and 16 packed bytes.
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>
#include <cstdio>

int main() {
  constexpr int kBlockSize = 32;
  float x[kBlockSize];
  while (std::fread(x, sizeof(float), kBlockSize, stdin) == kBlockSize) {
    float amax = 0.0f;
    for (float v : x) {
      // Written so that a NaN, once met, stays.
      if (!(std::fabs(v) <= amax)) amax = std::isnan(amax) ? amax : std::fabs(v);
    }
    const uint8_t scale = __nv_cvt_float_to_e8m0(amax / 6.0f, __NV_SATFINITE, cudaRoundPosInf);
    uint8_t block[1 + kBlockSize / 2] = {scale};
    for (int j = 0; j < kBlockSize; ++j) {
      const float scaled = std::ldexp(x[j], 127 - scale);
      const uint8_t code = __nv_cvt_float_to_fp4(scaled, __NV_E2M1, cudaRoundNearest);
      block[1 + j / 2] |= static_cast<uint8_t>(code << (4 * (j % 2)));
    }
    std::fwrite(block, 1, sizeof(block), stdout);
  }
  return 0;
}
