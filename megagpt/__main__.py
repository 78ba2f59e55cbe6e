"""`python -m megagpt VERB`, the same as `megagpt VERB`."""

from megagpt.commands import command

if __name__ == "__main__":
    command()
