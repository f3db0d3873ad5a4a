"""Before a run: what it will take (memory, throughput, hours, cost), and whether the machines are fit for it."""
