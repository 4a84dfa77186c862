"""What every training of a backbone is made of: pairs, loss, optimiser, processes, checkpoints."""
