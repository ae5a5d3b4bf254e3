"""What `benchmarks/accelerator.py` measures, one file per section."""
