"""The counters of emulated calls: sums, texts, the table of all configs."""
