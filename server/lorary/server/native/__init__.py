"""Kernels in C++ for the CPU: compiled at first use by the system's compiler, called by ctypes."""
