"""A door to `megagpt demo prepare`, for jobs that name a script."""

from megagpt.commands import command

if __name__ == "__main__":
    command("demo", "prepare")
