"""Self-Distillation Through Time: rounds, the targets of the teacher, divergences.

Torch only.
"""
