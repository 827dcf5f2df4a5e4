// How a float32 number is kept in a bfloat16 parameter: rounded to the nearest (by torch's own
// conversion, in the launchers), rounded stochastically, or with its low bits in a state beside it.
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

// Rounds up or down with the probability that makes the mean exact. The random bits depend on the
// seed and on the entry's place alone, counted in entries of memory from the parameter's first:
// there is no state, and every order of the entries gives the same. Beyond 2^32 entries the bits
// repeat.
DEEPOPT_RULE uint16_t stochastic(float x, uint32_t key, uint32_t place) {
  const uint32_t bits = without_payload(bits_of(x));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return uint16_t((bits + (finite ? scrambled(place + key) >> 16 : 0u)) >> 16);
}

// Splits x into the nearest bfloat16, ties away from zero, and the bits that it lacks.
DEEPOPT_RULE void split(float x, uint16_t& high, uint16_t& low) {
  const uint32_t bits = without_payload(bits_of(x));
  high = uint16_t((bits + 0x8000u) >> 16);
  low = uint16_t(bits);
}

// Puts the two together again. split() leaves no zero with negative low bits beside it. Where there
// is one, somebody else has set the parameter to zero, as pruning does, and the low bits are stale:
// with them the number would be a NaN.
DEEPOPT_RULE float joined(uint16_t high, uint16_t low) {
  const int32_t beside = int16_t(low);
  const bool stale = (high & 0x7fffu) == 0 && beside < 0;
  return float_of((uint32_t(high) << 16) + uint32_t(stale ? 0 : beside));
}

}  // namespace deepopt
