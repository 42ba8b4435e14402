"""Kill, damage, fill the disk: what benchmarks/faults.py and tests/test_faults.py do to runs."""
