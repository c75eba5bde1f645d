"""Other libraries' models on these kernels."""
