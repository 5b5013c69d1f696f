"""Checks of the planner against training: a step traced on fake tensors, a dry run, a device calibration."""
