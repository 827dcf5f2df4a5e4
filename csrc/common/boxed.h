// How an operator with many arguments takes them: as one struct, filled from the dispatcher's
// stack.
//
// TORCH_BOX unpacks the stack into a parameter list, which every launcher would have to spell out
// and pass on. Here a struct lists its members once, in the order of the operator's schema.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace deepopt {

// The arguments of one call, from the first to the last; each can be taken once.
class BoxedCall {
 public:
  BoxedCall(StableIValue* stack, uint64_t arguments) : next_(stack), end_(stack + arguments) {}

  // Fills variables in the order of the schema. A struct with take_from() fills its own members.
  template <class... T>
  void take(T&... to) {
    (take_one(to), ...);
  }
  void check_all_taken() const {
    STD_TORCH_CHECK(next_ == end_,
                    "deepopt: an operator's schema has more arguments than its kernel");
  }

 private:
  template <class T>
  void take_one(T& to) {
    if constexpr (requires(BoxedCall& call) { to.take_from(call); }) {
      to.take_from(*this);
    } else {
      STD_TORCH_CHECK(next_ != end_,
                      "deepopt: an operator's schema has fewer arguments than its kernel");
      to = torch::stable::detail::to<T>(*next_++);
    }
  }

  StableIValue *next_, *end_;
};

// What m.impl() takes for `kernel`, a function of these arguments, structs among them.
template <auto kernel, class... Arguments>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  std::tuple<Arguments...> given;
  BoxedCall call(stack, arguments);
  std::apply([&](auto&... each) { call.take(each...); }, given);
  call.check_all_taken();
  if constexpr (std::is_void_v<decltype(std::apply(kernel, given))>) {
    std::apply(kernel, given);
  } else {
    stack[0] = torch::stable::detail::from(std::apply(kernel, given));
  }
}

}  // namespace deepopt
