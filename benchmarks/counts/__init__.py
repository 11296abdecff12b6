"""What a step of DPO computes and moves, of this project and of others, by exact counts. Nothing is trained."""
