"""Time of one fused step of ExcessMTL against what else computes it, and against the memory it has to move.

    python bench/bench_fused_step.py                  # this machine's CPU, under 4 minutes
    python bench/bench_fused_step.py --device cuda    # the same with GB/s against a device-to-device copy

Floor. A step reads each gradient once, and reads and writes its sum of squares: 12 bytes per
float32 element (bfloat16 and float16 gradients: 10, float64: 24). With gradient momentum it also
reads and writes the running mean: 20 (18, 40). The floor's time is measured, not computed: on the
CPU an in-place pass ``torch.add(src, dst, out=dst)`` over as many float32 elements as move the same
bytes, on CUDA a device-to-device copy of the same bytes (half read, half written).

Contestants:

- ``fused``: :func:`excessmtl_ext.functional.fused_step_`, called as a balancer calls it.
- ``op``: the same op with its arguments at hand (overhead section): no Python prepares them.
- ``floor``: see above.
- ``eager``: the usual loop, written after the published algorithm: concatenate every task's
  gradients, stack, then per task square, add, root, divide, dot; then the weights.
- ``compiled``: ``torch.compile`` of the same formula over all tasks; it has to concatenate too.
- ``foreach`` (CUDA): the same formula by ``torch._foreach_*``, which need not concatenate.
- ``reference``: :mod:`excessmtl_ext.reference`, the plain twin.

``--output`` (default: ``bench/results/fused_step_<hardware>_<yyyymm>``) receives config.json,
environment.json, measurements.json, fused_step.png and a README.md with the tables.
"""

from __future__ import annotations

from fused_step.run import main

if __name__ == "__main__":
    main()
