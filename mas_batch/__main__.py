"""`python -m mas_batch`: the whole command group."""

if __name__ == "__main__":
    # Here, not above: the embedded workers import this module again, and need no command line.
    from mas_batch.cli import main

    main(prog_name="python -m mas_batch")
