#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t wide = uint32_t(b.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
