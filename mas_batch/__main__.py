"""`python -m mas_batch`: the whole command group."""

from mas_batch.cli import main

if __name__ == "__main__":
    main(prog_name="python -m mas_batch")
