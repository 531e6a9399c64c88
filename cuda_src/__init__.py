"""The CUDA C++ sources, as a package so that they are found wherever anyattn is installed."""
