"""How a batched step is carried out; nothing here knows what the step computes."""
