#pragma once
#include <cmath>
#include <cstdint>

struct __half { uint16_t bits; };

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? std::ldexp(1024.f + fraction, exponent - 25)
                               : std::ldexp(float(fraction), -24);
  return h.bits >> 15 ? -value : value;
}
