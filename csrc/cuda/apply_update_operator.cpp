// deepopt::apply_update_ on CUDA.
#include "../common/apply_update_arguments.h"

#include "apply_update_kernels.h"
#include "operator.h"

namespace deepopt::cuda {
namespace {

void on_apply_update(const ApplyUpdateArguments& given) {
  const auto& [params, updates, lows, seeds, lr, weight_decay] = given;
  if (params.empty()) return;
  const Device device(params[0]);
  given.check();
  const Roundings roundings = given.roundings();
  std::vector<Walk<3>> walks;
  std::vector<uint32_t> keys;
  std::vector<Dtypes> dtypes;
  walks.reserve(params.size());
  for (size_t t = 0; t < params.size(); ++t) {
    STD_TORCH_CHECK(device.has(params[t]) && device.has(updates[t]) && device.has(roundings.low(t)),
                    "deepopt::apply_update_: tensors must be on one device");
    given.add_walk(walks, t);
    keys.push_back(roundings.noise(t).key);
    dtypes.push_back({kind_of(params[t]), kind_of(updates[t]), roundings.of(t)});
  }
  in_tables<3>(walks, keys, dtypes, [&](const auto& table, const Dtypes& of) {
    if (of.param == Kind::f64) {
      apply_update(table, given.rule<double>(), of.param, of.rounding, device.stream());
    } else {
      apply_update(table, given.rule<float>(), of.param, of.rounding, device.stream());
    }
  });
  device.check_launch();
}

}  // namespace
}  // namespace deepopt::cuda

DEEPOPT_CUDA_LIBRARY {
  m.impl("apply_update_",
         &deepopt::boxed<&deepopt::cuda::on_apply_update, deepopt::ApplyUpdateArguments>);
}
