"""What benchmarks, stress tests and the demo show and write: facts of the machine, tables, a live picture."""
