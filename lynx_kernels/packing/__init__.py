"""Sequence packing on the host: decides which samples go into which pack, before any tensor is made."""

from lynx_kernels.packing.planner import PackPlanner, Step, plan_packs

__all__ = ["PackPlanner", "Step", "plan_packs"]
