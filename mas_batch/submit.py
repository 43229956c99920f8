"""`python -m mas_batch.submit JOB.yaml`: the `submit` command by its module name."""

if __name__ == "__main__":
    # Here, not above: the embedded workers import this module again, and need no command line.
    from mas_batch.cli import submit

    submit(prog_name="python -m mas_batch.submit")
