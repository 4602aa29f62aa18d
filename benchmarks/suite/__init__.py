"""`make bench`: saves and loads against the hardware's floors, and against peers.

::

    python -m benchmarks.suite                  # all, about ten minutes
    python -m benchmarks.suite --quick          # about two
    python -m benchmarks.suite --list           # the rows
    python -m benchmarks.suite --only 'durable save' --place disk --ranks 2 --pairs 5

What is compared takes turns in one process group (A, B, A, B), since machines drift; what counts is
the ratio, pair by pair: its median and quartiles. docs/performance.md says what the floors are.

==============  ==================================================================================
`rows`          what is measured, what it is divided by, and its limit
`states`        what is saved
`floors`        what the hardware takes: write + fsync, copy, read
`turns`         ranks in step, taking turns, pairs and their quartiles
`training`      loops that compute, beside which saves run
`memory`        peak memory
`ours`          the measurements of distckpt, by row
`peers`         other libraries, each behind one adapter; `against` measures with them
`session`       one process group under mpirun: some measurements over one state in one place
`jobs`          which sessions there are
`run`           starts them, collects what they found
`report`        JSON, a Markdown table, and plots
==============  ==================================================================================
"""
