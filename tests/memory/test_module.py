"""Arguments of the module memory; what it computes is tested with DMGD."""

import re
import threading
import time

import pytest
import torch
from torch import nn

from deepopt.memory import Module


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"factory": "mlp"}, TypeError, "Invalid memory: 'mlp' is no factory"),
        ({"factory": nn.Linear(2, 2)}, TypeError, "is no factory"),
        ({"granularity": "rows"}, ValueError, "Invalid granularity: 'rows'; choose from"),
        ({"objective": "mse"}, ValueError, "Invalid objective: 'mse'; choose from"),
        ({"inner_lr": -0.1}, ValueError, "Invalid inner_lr: -0.1"),
        ({"inner_lr": float("nan")}, ValueError, "Invalid inner_lr: nan"),
        ({"inner_lr": float("inf")}, ValueError, "Invalid inner_lr: inf"),
        ({"inner_steps": 0}, ValueError, "Invalid inner_steps: 0"),
        ({"feature_map": ()}, ValueError, "Invalid feature_map: ()"),
        ({"feature_map": "cubic"}, ValueError, "Invalid feature_map: 'cubic'"),
        ({"preconditioner": "identity"}, ValueError, "Invalid preconditioner: 'identity'"),
        ({"time_scales": (0.5, 1.0)}, ValueError, "Invalid time_scales: (0.5, 1.0)"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Module(**{"factory": nn.Linear, **arguments})


def test_one_thread_at_a_time_makes_a_module_because_the_generator_is_shared():
    inside, most = 0, []

    def factory(in_features: int, out_features: int) -> nn.Module:
        nonlocal inside
        inside += 1
        time.sleep(0.02)
        most.append(inside)
        inside -= 1
        return nn.Linear(in_features, out_features)

    def make() -> None:
        Module(factory).init(torch.zeros(1, 3, 4))

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
