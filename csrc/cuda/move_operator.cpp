// deepopt::move_ on CUDA.
#include "move.h"
#include "operator.h"

namespace deepopt::cuda {
namespace {

void move_(std::vector<Tensor> params, std::vector<Tensor> updates, std::vector<Tensor> lows,
           std::vector<int64_t> seeds, double lr, double weight_decay) {
  if (params.empty()) return;
  const Device device(params[0]);
  const Roundings roundings{params, lows, seeds};
  roundings.check();
  STD_TORCH_CHECK(updates.size() == params.size(), "deepopt::move_: one update for each parameter");
  std::vector<Walk<3>> walks;
  std::vector<uint32_t> keys;
  std::vector<Dtypes> dtypes;
  walks.reserve(params.size());
  for (size_t t = 0; t < params.size(); ++t) {
    const Tensor& low = roundings.low(t);
    STD_TORCH_CHECK(device.has(params[t]) && device.has(updates[t]) && device.has(low),
                    "deepopt::move_: tensors must be on one device");
    const Kind param = kind_of(params[t]), update = param == Kind::f64 ? param : Kind::f32;
    STD_TORCH_CHECK(kind_of(updates[t]) == update, "deepopt::move_: an update's dtype has no kernel");
    check_same_shape(updates[t], params[t]);
    walks.emplace_back(params[t],
                       std::array<View, 3>{View(params[t]), View(updates[t]), View(low)});
    keys.push_back(roundings.noise(t).key);
    dtypes.push_back({param, update, roundings.of(t)});
  }
  in_tables<3>(walks, keys, dtypes, [&](const auto& table, const Dtypes& of) {
    if (of.param == Kind::f64) {
      move(table, Move<double>(lr, weight_decay), of.param, of.rounding, device.stream());
    } else {
      move(table, Move<float>(lr, weight_decay), of.param, of.rounding, device.stream());
    }
  });
  device.check_launch();
}

}  // namespace
}  // namespace deepopt::cuda

DEEPOPT_CUDA_LIBRARY { m.impl("move_", TORCH_BOX(&deepopt::cuda::move_)); }
