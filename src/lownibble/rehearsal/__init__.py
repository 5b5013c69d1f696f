"""Training and planning held against each other: a step traced on fake tensors, a run tried out, a device calibrated."""
