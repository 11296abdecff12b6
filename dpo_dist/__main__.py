"""`python -m dpo_dist`, which is also what torchrun and the deepspeed launcher start."""

from dpo_dist.cli import main

if __name__ == "__main__":
    main()
