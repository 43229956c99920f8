"""`python -m mas_batch.submit JOB.yaml`: the `submit` command by its module name."""

from mas_batch.cli import submit

if __name__ == "__main__":
    submit(prog_name="python -m mas_batch.submit")
