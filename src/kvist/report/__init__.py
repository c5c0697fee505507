"""What was measured, to read: one page, one table, one picture, and whether a difference is real."""
