"""Emitters: functions that write the Python of an instruction, by group, and what that Python calls."""
