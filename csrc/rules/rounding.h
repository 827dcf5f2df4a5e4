// How a float32 number is kept in a bfloat16 parameter: rounded to the nearest (the launchers have
// torch's own conversion for it), rounded stochastically, or with its low bits in a state beside.
#pragma once
#include "rule.h"

namespace deepopt {

enum class Rounding { nearest, stochastic, exact };

constexpr uint32_t kNaN = 0x7fc00000u;

DEEPOPT_RULE uint32_t without_payload(uint32_t bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? kNaN : bits;
}

// Every bit of the result depends on every bit of x (the finalizer of MurmurHash3).
DEEPOPT_RULE uint32_t scrambled(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

DEEPOPT_RULE uint32_t key_of(int64_t seed) {
  const auto bits = uint64_t(seed);
  return scrambled(scrambled(uint32_t(bits >> 32) + 1u) ^ uint32_t(bits));
}

// Up or down with the probability that makes the mean exact: by bits that depend on nothing but the
// seed and the entry's place, counted in entries of memory from the parameter's first. No state, and
// the same in every order of the entries; beyond 2^32 of them the bits repeat.
DEEPOPT_RULE uint16_t stochastic(float x, uint32_t key, uint32_t place) {
  const uint32_t bits = without_payload(bits_of(x));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return uint16_t((bits + (finite ? scrambled(place + key) >> 16 : 0u)) >> 16);
}

// The nearest bfloat16, ties away from zero, and what it lacks: together exactly x.
DEEPOPT_RULE void split(float x, uint16_t& high, uint16_t& low) {
  const uint32_t bits = without_payload(bits_of(x));
  high = uint16_t((bits + 0x8000u) >> 16);
  low = uint16_t(bits);
}

// No zero has negative low bits beside it: they are those of what another hand has set to zero, as
// pruning does, and below a zero's bits are those of NaN.
DEEPOPT_RULE float joined(uint16_t high, uint16_t low) {
  const int32_t beside = int16_t(low);
  const bool stale = (high & 0x7fffu) == 0 && beside < 0;
  return float_of((uint32_t(high) << 16) + uint32_t(stale ? 0 : beside));
}

}  // namespace deepopt
