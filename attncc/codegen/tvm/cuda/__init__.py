"""CUDA kernels through TVM: dense attention on tensor cores, deployed as cubins that need neither Triton nor TVM."""
