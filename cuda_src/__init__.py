"""The CUDA C++ sources, as package data; README.md beside this file gives the reading order."""
