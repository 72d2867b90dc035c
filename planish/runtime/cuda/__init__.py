"""CUDA C++ kernels, compiled ahead of time for several architectures and launched through the driver."""
