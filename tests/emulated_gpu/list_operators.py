#!/usr/bin/env python3
"""Prints the operators that have their own CUDA kernel in the PyTorch that runs this.

operators.txt is its output with PyTorch 2.11.0+cu130. It needs no GPU.
"""

import torch

names = torch._C._dispatch_get_all_op_names()
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*sorted(n for n in names if n.startswith("aten::") and has(n, "CUDA")), sep="\n")
