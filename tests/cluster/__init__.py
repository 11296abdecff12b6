"""Two machines on one kernel, and a real Slurm on them: by hand, as root, `./launch/test.sh -m cluster`."""
