"""Sequence packing on the host: which samples go into which pack, before any tensor."""

from lynx_kernels.packing.planner import PackPlanner, Step, plan_packs

__all__ = ["PackPlanner", "Step", "plan_packs"]
