"""What is measured, each a program of its own: it reads a spec, takes one optimizer step a batch, writes what it saw.

The programs of other trainers run where those are installed, so they import nothing of mlx_dpo.
"""
