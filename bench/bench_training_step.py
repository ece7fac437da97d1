"""Time and peak memory of a whole training step: each balancer, each mode, the lower bound, and the peers.

    python bench/bench_training_step.py                                   # all workloads, on this machine's CPU
    python bench/bench_training_step.py --device cuda
    python bench/bench_training_step.py --workloads mlp tasks --rows uniform lower_bound exact --rounds 11

What all rows share. A step empties ``.grad``, runs encoder and heads on the next of four batches,
lets the row fill ``.grad``, and takes a step of Adam. Rows differ in how they fill ``.grad`` and in
nothing else: same initial parameters, same batches, same Adam. Before anything is timed, rows that
compute the same thing (exact ExcessMTL in all its modes, torchjd's and LibMTL's, the loop in plain
PyTorch) are compared, gradient by gradient, over three steps; a difference ends the run.

Rows. ``uniform``: one backward pass of the summed loss. ``lower_bound``: a backward pass per task
and nothing else: the encoder's gradients are dropped before the next pass, and Adam gets those of
the last task. The others are described where they are made, in ``training_step/rows.py``; a new
mode is one more entry of ``ROWS`` there.

Time. Rows run in turn, round after round, in one process; a sample is the mean over some steps. A
ratio is the median over rounds of the ratio within a round, so the machine's moods meet both sides.

Peak memory. The most bytes that torch's allocator held for a row at one time: parameters, Adam's
state, the method's state, activations and gradients, from the row's first allocation to the end of
its third step; the batches are everybody's and not counted. On CUDA it is
``torch.cuda.max_memory_allocated``, on the CPU the running sum of the allocator's events in torch's
profiler, which is the same quantity. The resident set of a fresh process would add the interpreter and its
libraries (hundreds of MiB) and what malloc keeps, and could not tell the rows of a small network
apart. Not seen: memory that does not come from torch's allocator, such as oneDNN's scratch buffers.

``--output`` (default: ``bench/results/training_step_<hardware>_<yyyymm>``) receives config.json,
environment.json, measurements.json, cost_against_tasks.png, cost_against_parameters.png and a
README.md. A workload is written when it is finished; the same command goes on after the last one,
unless commit, versions or options have changed. ``--redraw`` makes README and pictures anew.
"""

from __future__ import annotations

from training_step.run import main

if __name__ == "__main__":
    main()
