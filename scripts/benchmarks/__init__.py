"""Measures training: time, memory and where they go, beside other trainers on the same rows."""
