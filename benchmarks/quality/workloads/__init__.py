"""One file per workload: data, model, loss, metrics."""
