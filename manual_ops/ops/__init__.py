"""One file per operation: derivation, Python kernels, Function, and the function with torch's signature."""
