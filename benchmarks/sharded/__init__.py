"""What a step communicates under FSDP2: `python -m sharded` in benchmarks/."""
