"""Runs the calls of tests/kernel_calls on the emulated kernels that MANUAL_OPS_LIBRARY names, in several orders.

    python run_calls.py PART OF ORDER...      every OF-th call from PART on

An ORDER is forward, reverse or a seed, with "+wide" behind it for indices of 64 bits. The folder tests/ must be on the
path.

What the Python body gives is worked out once for all orders. Prints the failures and the number of runs; exits with 1
if there are failures.
"""

import os
import sys
import traceback

import torch

from kernel_calls import ALL, FLOATING, compare, expected_of


def main() -> None:
    part, of, *orders = sys.argv[1:]
    torch.set_num_threads(1)
    runs, failures = 0, 0
    for call in ALL[int(part) :: int(of)]:
        for dtype in FLOATING:
            expected = expected_of(call, dtype)
            for order in orders:
                name, _, wide = order.partition("+")
                os.environ["CUDA_EMULATION_ORDER"] = name
                os.environ["CUDA_EMULATION_WIDE"] = "1" if wide else "0"
                runs += 1
                try:
                    compare(call, dtype, "cpu", expected)
                except Exception:
                    failures += 1
                    print(f"{call}, {dtype}, {order}: {traceback.format_exc(limit=0)}")
    print(f"{runs} runs, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
