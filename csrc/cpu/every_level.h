// Compiles the file that DEEPOPT_LEVEL_FILE names once for every level of the processor, in namespaces
// v4, v3 and base. There kBytes is the length of a register, and kFused says whether the processor
// multiplies and adds in one instruction. processor_level() in levels.h tells which one to call.

#if defined(DEEPOPT_LEVELS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
constexpr int64_t kBytes = 64;
constexpr bool kFused = true;
#include DEEPOPT_LEVEL_FILE
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
constexpr int64_t kBytes = 32;
constexpr bool kFused = true;
#include DEEPOPT_LEVEL_FILE
}  // namespace v3
#pragma GCC pop_options
#endif

namespace base {
#if defined(__AVX512F__)
constexpr int64_t kBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif
constexpr bool kFused = kBytes > 16;
#include DEEPOPT_LEVEL_FILE
}  // namespace base

#undef DEEPOPT_LEVEL_FILE
