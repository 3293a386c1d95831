"""``python -m tests.chaos``."""

# Replicas import this file once more, as multiprocessing has it: everything else is behind the guard.
if __name__ == "__main__":
    import sys

    from tests.chaos.command import main

    sys.exit(main())
