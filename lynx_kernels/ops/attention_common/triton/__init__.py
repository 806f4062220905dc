"""What the Triton kernels of the attention operations share.

Grids depend on shapes only, and programs find their tiles in the layout's table. The host reads nothing and plans
nothing, so calls can be captured into CUDA graphs. Work is divided into tiles, not samples. The time of a program grows
with the keys that its tile sees. In a long causal sequence the longest programs start first.
"""
