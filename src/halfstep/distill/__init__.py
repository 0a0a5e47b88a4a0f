"""Self-Distillation Through Time: the plan of rounds, the teacher's targets, the divergences. Torch only."""
