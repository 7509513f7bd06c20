"""The fused squared difference over layers: a Triton kernel for GPUs, and its twin of plain torch operations."""
