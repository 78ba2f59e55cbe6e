"""A door to `megagpt train`: `deepspeed`, `torchrun` and `srun` start a script on every rank."""

from megagpt.commands import command

if __name__ == "__main__":
    command("train")
