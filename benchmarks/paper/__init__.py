"""The paper's protocol at full scale: `python -m paper.run TABLE --model MODEL` in benchmarks/, or `make paper`."""
